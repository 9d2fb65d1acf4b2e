"""`rtb-inverse fit | test | predict --config FILE.yaml`: Lightning's command line over any model and data module. (`validate` is for the
recipes of priors.)"""

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

from rtb_inverse.lightning import quiet


class CommandLine(LightningCLI):
    """Lightning's command line with safe defaults: nothing is unpickled but tensors and plain types, and a bad option is one line."""

    def before_instantiate_classes(self):
        options = self.config[self.subcommand]
        if options.get("weights_only") is None:
            options.weights_only = True

    def instantiate_classes(self):
        try:
            super().instantiate_classes()
        except (FileNotFoundError, TypeError, ValueError) as error:
            while str(error).startswith("Does not validate") and error.__cause__ is not None:
                error = error.__cause__  # jsonargparse wraps what a constructor said
            self.parser.exit(2, f"rtb-inverse: error: {error}\n")


def run(args: list[str] | None = None) -> CommandLine:
    """Run the command line and return it, with the `model`, `datamodule` and `trainer` it made; `args` stands for sys.argv[1:]."""
    with quiet():
        return CommandLine(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            args=args,
        )


def main(args: list[str] | None = None) -> None:
    """The command `rtb-inverse`: what it returned would be its exit status."""
    run(args)


if __name__ == "__main__":
    main()
