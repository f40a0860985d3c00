"""What to say where a module's library is not installed."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed_by(module: str) -> Iterator[None]:
    """Has the error of a failed import name the extra that installs what is missing.

    Args:
        module: The module that imports, such as "ppv2.aioquic"; its last part is the
            name of the extra.
    """
    try:
        yield
    except ImportError as error:
        extra = module.rpartition(".")[2]
        raise type(error)(
            f"{module}: {error}; pip install 'ppv2[{extra}]' installs what it needs",
            name=error.name,
            path=error.path,
        ) from error
