"""The file that keeps what each norm of a model costs, so that the next run need not measure."""

import json
from pathlib import Path

from transformer_lens import HookedTransformer

from lnfree_interp.errors import DataError
from lnfree_interp.files import write_new_file
from lnfree_interp.removal.sensitivity import SiteSensitivity
from lnfree_interp.removal.training_state import fingerprint


def read_costs(file: str, model: HookedTransformer) -> SiteSensitivity:
    """What `write_costs` has written.

    Raises:
        DataError: if it is not such a file, or one of another model.
    """
    try:
        plain = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error!s:.100}") from error
    if not isinstance(plain, dict) or plain.keys() != {"model", "costs"}:
        raise DataError(f"{file} is not a file that `lnfree remove --costs` wrote")
    if plain["model"] != fingerprint(model):
        raise DataError(
            f"{file} says what the norms of another model cost: give another name, to measure "
            "those of this model"
        )
    return SiteSensitivity.from_json(plain["costs"])


def write_costs(file: str, model: HookedTransformer, costs: SiteSensitivity) -> None:
    """Write what each norm of a model costs to a new file.

    Raises:
        OutputError: if it cannot be written.
    """
    plain = {"model": fingerprint(model), "costs": costs.to_json()}
    write_new_file(file, json.dumps(plain, indent=1) + "\n")
