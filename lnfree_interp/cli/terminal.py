"""What all commands print, and what they keep libraries from printing."""

import os


def say(line: str) -> None:
    """Print a line; of several processes only the main one does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def import_libraries() -> None:
    """Import the libraries that take seconds, without their progress bars and advice."""
    say("importing torch, transformers and transformer_lens")
    import logging

    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
