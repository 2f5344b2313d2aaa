"""What every command says and does not say."""

import os


def say(line: str) -> None:
    """A line for the user, from one of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def quiet_libraries() -> None:
    """Their progress bars and advice would drown ours."""
    import logging

    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
