"""The subcommands of `mixmae` that need no torch: one module each, with a `main(argv)`."""
