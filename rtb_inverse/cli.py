"""`rtb-inverse fit | validate | test | predict --config FILE.yaml`: Lightning's command line over any model and data module of the project."""

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI


def main(args: list[str] | None = None) -> LightningCLI:
    """Run the command line; `args` stands for sys.argv[1:]."""
    return LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=None,
        auto_configure_optimizers=False,
        args=args,
    )


if __name__ == "__main__":
    main()
