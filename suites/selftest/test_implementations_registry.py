"""Addresses of implementations: each resolves, or says in one sentence why not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from harness.implementations import AdapterError, names, resolve

ADAPTERS = {
    "broken_import": "import no_such_package_at_all\n",
    "broken_syntax": "def make(:\n",
    "raising": "raise RuntimeError('first line\\nsecond line')\n",
    "fine": """
number = 3
class Impl:
    name = "fine:make"
    needs_architecture = False
    def build(self, architecture, *, device, dtype, seed): raise NotImplementedError
def make(): return Impl()
def makes_nothing(): return None
def fails(): raise ValueError("no licence")
def needs_more(argument): return Impl()
def nameless():
    impl = Impl(); impl.name = None
    return impl
""",
}

WRONG = {
    "": "there is no implementation ''",
    "referense": "did you mean 'reference'?",
    "mixtral": "say reference, independent, null, mutant:NAME, transformers:NAME, openai:URL or package",
    "fine:": "there is no implementation 'fine:'",
    "mutant:no-such-mutant": "there is no mutant 'no-such-mutant'",
    "no_such_module:make": "there is no module 'no_such_module' to import",
    "fine.deeper:make": "there is no module 'fine.deeper' to import",
    "broken_import:make": "importing broken_import needs 'no_such_package_at_all', absent here",
    "broken_syntax:make": "importing broken_syntax failed with SyntaxError",
    "raising:make": "importing raising failed with RuntimeError: first line",
    "fine:mak": "did you mean 'make'?",
    "fine:number": "number is a int, not a factory to call",
    "fine:fails": r"fails\(\) failed with ValueError: no licence",
    "fine:needs_more": r"needs_more\(\) failed with TypeError",
    "fine:makes_nothing": r"makes_nothing\(\) returned a NoneType without `build`",
    "fine:Impl.build": "has no 'Impl.build'",
    "fine:nameless": r"what nameless\(\) returned has no name of type str",
    "folder/fine.py:make": "name the module, not the file: folder.fine:make",
    "transformers:mixtrl": "has no model_type 'mixtrl', did you mean 'mixtral'?",
    "transformers:clip": "transformers:clip has no causal language model",
    "transformers:mixtral,expert=eager": "no option 'expert', did you mean 'experts'?",
    "transformers:mixtral,experts=grouped": "experts cannot be 'grouped', did you mean 'grouped_mm'?",
    "transformers:mixtral,experts": "experts cannot be ''",
}


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """Modules of strangers, importable."""
    for name, text in ADAPTERS.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ADAPTERS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("address", WRONG)
@pytest.mark.usefixtures("strangers")
def test_a_wrong_address_is_one_sentence(address: str) -> None:
    """Every way to go wrong is an AdapterError of one line that names what is wrong."""
    if address.startswith("transformers:"):
        pytest.importorskip("transformers")
    with pytest.raises(AdapterError, match=WRONG[address]) as caught:
        resolve(address)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("strangers")
def test_a_right_address_resolves() -> None:
    """A factory's implementation, the reference and a family of transformers answer to their addresses."""
    assert resolve("fine:make").name == "fine:make"
    assert resolve("reference").name == "reference"
    pytest.importorskip("transformers")
    for address in ("transformers:mixtral", "transformers:qwen3_moe,experts=grouped_mm,attention=sdpa"):
        assert resolve(address).name == address
    assert resolve("transformers:mixtral,experts=eager").name == "transformers:mixtral"


def test_every_listed_name_resolves() -> None:
    """What `names` lists can be had."""
    pytest.importorskip("transformers")
    for name in names():
        assert resolve(name).name == name


def test_without_transformers_the_extra_is_named(monkeypatch) -> None:
    """Without the package the error says which extra to install."""
    from harness.implementations.transformers.library import library

    library.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AdapterError, match=r"pip install 'moe-harness\[transformers\]'"):
        resolve("transformers:mixtral")
    library.cache_clear()


def test_the_package_imports_without_torch() -> None:
    """Resolving a wrong address and listing families need neither torch nor transformers."""
    code = (
        "import sys; sys.modules['harness.mutants'] = None\n"
        "from harness.implementations import AdapterError, names, resolve\n"
        "names()\n"
        "try: resolve('nothing')\n"
        "except AdapterError: pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
