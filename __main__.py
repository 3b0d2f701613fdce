"""`python -m dtpipe`: the command line."""

from dtpipe.pipeline.cli.main import main

if __name__ == "__main__":
    main(prog_name="dtpipe")
