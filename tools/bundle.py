"""Put a program that is started in front of every launch, or job, and all its modules into one file of byte code.

A module that is imported the ordinary way is looked for, opened, stat-ed and read: 0.1 to 0.2 ms each, for twenty modules
a quarter of what the interpreter itself needs to start. Here they come with the file that is read anyway, are put into
sys.modules in the order of their dependencies, and every later ``import`` just finds them there.
"""

import ast
import importlib.util
import marshal
from pathlib import Path
from types import CodeType

# MODULES and LAST are constants that bundle() replaces: (name, is a package, code) of each module, and what is done then.
# The collector of cyclic garbage is off: a run ends before there is any worth finding, and looking for it among all that was
# loaded costs as much as ten mounts.
LOADER = """
import gc
gc.disable()
import sys
for name, package, code in MODULES:
    module = type(sys)(name)
    module.__file__ = code.co_filename
    if package:
        module.__path__ = [code.co_filename.rpartition("/")[0]]  # what is not in here is found as usual
    sys.modules[name] = module
    exec(code, module.__dict__)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
del name, package, code, module, parent, child
exec(LAST)
"""


def bundle(tree: Path, libexec: str, name: str, entry: str, last: Path | None = None) -> None:
    """Write *tree*/*name*.pyc from the package below *tree*, which will lie at *libexec* when it is installed.

    *entry*: the module that, with all that it needs, is in it; *last*: a source file that is executed then, as a program.
    Without one the result is a module, with the main() of *entry*.
    """
    modules = []
    for module in _ordered(tree, entry):
        source, package = _source(tree, module)
        modules.append((module, package, _compile(source, tree, libexec)))
    code = _compile(last, tree, libexec) if last else compile(f"from {entry} import main", name, "exec")
    loader = compile(LOADER.replace("MODULES", "'MODULES'").replace("LAST", "'LAST'"), f"{libexec}/{name}.pyc", "exec")
    values: dict[object, object] = {"MODULES": tuple(modules), "LAST": code}
    constants = tuple(values.get(c, c) if isinstance(c, str) else c for c in loader.co_consts)
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)  # PEP 552: hash-based, unchecked
    (tree / f"{name}.pyc").write_bytes(header + marshal.dumps(loader.replace(co_consts=constants)))


def _ordered(tree: Path, entry: str) -> list[str]:
    """Return the modules that *entry* needs at import, each after those that it needs itself, packages first."""
    done: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if "." in name:
            visit(name.rpartition(".")[0])
        for needed in _imports(tree, name):
            visit(needed)
        if name not in done:
            done.append(name)

    visit(entry)
    return done


def _imports(tree: Path, name: str) -> list[str]:
    """Return the modules of ours that the statements at the top level of *name* import."""
    found = []
    for node in ast.parse(_source(tree, name)[0].read_bytes()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "shifter":
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [module if _source(tree, module)[0].exists() else node.module for module in submodules]
    return found


def _source(tree: Path, name: str) -> tuple[Path, bool]:
    """Return the file of a module, and whether it is a package."""
    path = tree / name.replace(".", "/")
    return (path / "__init__.py", True) if path.is_dir() else (path.with_suffix(".py"), False)


def _compile(source: Path, tree: Path, libexec: str) -> CodeType:
    module = ast.parse(source.read_bytes())
    for node in ast.walk(module):  # nobody asks for annotations: they would be read, and put together, at every start
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
    return compile(module, f"{libexec}/{source.relative_to(tree)}", "exec", dont_inherit=True, optimize=2)
