"""The demo that `make train` trained, in llama.cpp, in transformers and here: the same ids of a
text, the same text of ids.

`make gguf-check` runs it: llama-cpp-python is compiled for this machine when it is installed.
"""

import pytest

from support.paths import ROOT
from support.runs import exit_code
from tinyllama_jax.data.tokenizer import load_tokenizer

RUN = ROOT / "runs" / "demo"
PROMPTS = (
    "The",
    "def  two(spaces):",
    "class A:\n    def f(self,  x):\n        return  x\n",
    "  a space, then  two and   three   ",
    "It isn't </s> the end, nor <s> a start.",
    "naïve Ünïcödé — 日本語 🙂",
    "import os\n\timport\tsys\r\n",
)
NEW = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The demo in fp16 as a folder, that folder read and written again, and this as a GGUF file."""
    folder = tmp_path_factory.mktemp("demo")
    for source, name in ((RUN, "hf"), (folder / "hf", "back")):
        argv = ["convert", source, folder / name, "--to", "hf", "--dtype", "float16"]
        assert exit_code(argv) == 0
    there, back = (folder / name / "model.safetensors" for name in ("hf", "back"))
    assert there.read_bytes() == back.read_bytes()
    assert exit_code(["convert", folder / "back", folder / "model.gguf", "--to", "gguf"]) == 0
    return folder


@pytest.fixture(scope="module")
def llama(models):
    import llama_cpp

    # Keys and values in fp32, as the two others keep them.
    return llama_cpp.Llama(
        str(models / "model.gguf"),
        n_ctx=256,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )


@pytest.mark.llama_cpp
@pytest.mark.parametrize("text", PROMPTS)
def test_a_text_has_the_same_ids_in_all_three(text, models, llama):
    from transformers import AutoTokenizer

    ours = load_tokenizer(RUN / "tokenizer.model").encode(text)
    assert AutoTokenizer.from_pretrained(models / "hf")(text)["input_ids"] == ours
    assert llama.tokenize(text.encode(), add_bos=False, special=False) == ours


@pytest.mark.llama_cpp
@pytest.mark.parametrize("text", PROMPTS)
def test_greedy_tokens_are_the_same_in_all_three(text, models, llama, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    argv = ["generate", models / "back", "--prompt", text, "--max-tokens", NEW, "--ids"]
    assert exit_code(argv) == 0
    ours = [int(token) for token in capsys.readouterr().out.split()]
    tokenizer = load_tokenizer(RUN / "tokenizer.model")
    start = tokenizer.encode(text)

    model = AutoModelForCausalLM.from_pretrained(models / "hf", dtype=torch.float32)
    ids = model.generate(torch.tensor([start]), max_new_tokens=NEW, do_sample=False)[0].tolist()
    assert [token for token in ids[len(start) :] if token != 2] == ours

    found = []
    for token in llama.generate(start, temp=0.0, repeat_penalty=1.0):
        if token == llama.token_eos() or len(found) == NEW:
            break
        found.append(token)
    assert found == ours

    # Bytes of a character that is not whole have no text, and are shown in another number.
    whole = tokenizer.decode(start + ours).rstrip("\ufffd")
    theirs = AutoTokenizer.from_pretrained(models / "hf").decode(start + ours)
    assert theirs.rstrip("\ufffd") == whole
    # llama.cpp keeps the space that sentencepiece puts in front of a text.
    shown = llama.detokenize(start + found).decode(errors="replace")
    assert shown.removeprefix(" ").rstrip("\ufffd") == whole
