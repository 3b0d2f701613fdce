"""What tests are built of: tiny teachers, datasets, checkpoints and folders, one builder each; tests import it as `parts`."""
