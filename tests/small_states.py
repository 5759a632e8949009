"""States of two tiny files, for tests."""

import resource
from contextlib import contextmanager

from rlhf.checkpoint import write

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def fill(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "abc").write_bytes(b"abc")
    (folder / "empty").write_bytes(b"")


def save(root, step, key="k", **metrics):
    return write(root, step, key, fill, {"metrics": metrics})


def names(root):
    return sorted(path.name for path in root.iterdir())


@contextmanager
def limited(which, value):
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))
