"""What `rlhf init` writes: a commented recipe for some data, and the files that it needs beside it."""
