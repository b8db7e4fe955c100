def build_info() -> dict[str, str]: ...

# (schema, ((name, dtypes, shape, layout), ...), ((name, low, high), ...)) of every op: csrc/library.h
ops: tuple[tuple[str, tuple[tuple[str, str, str, int], ...], tuple[tuple[str, str, str], ...]], ...]
