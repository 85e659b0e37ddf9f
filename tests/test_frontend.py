"""Every way a model gets in, and every file that is not one."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import models
import pytest
import torch
import transformers
from torch import nn
from torch.export import Dim

from mla_compile import api
from mla_compile.conversion.loading import load_source
from mla_compile.conversion.request import ModelSource
from mla_compile.errors import LoadError
from mla_compile.passes.recognise import recognise
from mla_compile.passes.retype import widened
from mla_compile.sources.capture import capture
from mla_compile.sources.exported import language_model, read_export
from mla_compile.sources.frontend import load_program
from mla_compile.sources.huggingface import plain_inputs, read_checkpoint
from mla_compile.text.evaluate import original_scorer

TINY = Path(__file__).parents[1] / "examples" / "tiny-llama"
DYNAMIC = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
HOW_TO_EXPORT = "Export it with torch.export.save(torch.export.export(model.eval(), (ids,), dynamic_shapes="
ROUNDING = 1e-6  # of the largest logit: the same float32 operators on the same machine, in another graph


class Wrapped(nn.Module):
    """Anything around a model; around the smallest one by default."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Sequential(nn.Embedding(models.VOCABULARY, 8), nn.Linear(8, models.VOCABULARY))


def export(module, inputs, dynamic_shapes) -> torch.export.ExportedProgram:
    """Plain `torch.export`, as its documentation shows it."""
    arguments, keywords = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        return torch.export.export(module, arguments, keywords, dynamic_shapes=dynamic_shapes)


def save(module, path: Path, inputs=None, dynamic_shapes=None) -> Path:
    inputs = (models.tokens(2, 5),) if inputs is None else inputs
    if dynamic_shapes is None:
        dynamic_shapes = dict.fromkeys(inputs, DYNAMIC) if isinstance(inputs, dict) else (DYNAMIC,) * len(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(export(module, inputs, dynamic_shapes), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama():
    return models.llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def nano():
    return models.handwritten(models.NanoGPT)


@pytest.fixture(scope="module")
def nano_file(folder, nano):
    return save(nano, folder / "nano.pt2")


@pytest.fixture(scope="module")
def llama_folder(folder, llama):
    llama.save_pretrained(folder / "llama")
    return folder / "llama"


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= ROUNDING * expected.abs().max()


def assert_same_model(program, module, **roles):
    """The program computes the module's logits at sizes it was not exported with, and knows its inputs."""
    found = {"attention_mask": program.attention_mask, "position_ids": program.position_ids}
    assert {k: v for k, v in found.items() if v} == {k: v for k, v in roles.items() if v and k in found}
    assert program.tokens == roles.get("tokens", "input_ids")
    score = original_scorer(program)
    for batch, length in ((1, 1), (1, 17), (3, 9)):
        ids = models.tokens(batch, length, seed=length)
        with torch.no_grad():
            assert_close(score(ids), models.logits(module, ids))


MASK, POSITIONS = {"attention_mask": "attention_mask"}, {"position_ids": "position_ids"}


# ---- what is read


def test_huggingface_folder(llama_folder, llama):
    program = load_program(llama_folder)
    assert_same_model(program, llama, **MASK, **POSITIONS)
    assert (program.in_memory, program.source, program.max_positions) == (False, str(llama_folder), 128)
    assert program.assets.folder == str(llama_folder)
    stored = json.loads((llama_folder / "config.json").read_text())
    for name in ("hidden_size", "num_key_value_heads", "rope_parameters", "vocab_size", "use_cache"):
        assert program.assets.config[name] == stored[name]
    assert program.assets.generation["eos_token_id"] == 0


@pytest.mark.parametrize("said", [1, "LlamaForCausalLM", [1], [], ["logging"], ["AutoConfig"], None], ids=str)
def test_a_folder_whose_class_is_none_is_read_by_its_family(llama_folder, llama, tmp_path, said):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"architectures": said}))
    try:
        found = read_checkpoint(str(folder), "auto", None)
    except LoadError:  # transformers itself reads no such configuration
        assert not isinstance(said, list | None)
    else:
        assert type(found) is type(llama)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_huggingface_folder_keeps_its_type(folder, dtype):
    """Oracle: the same model with weights rounded here; its rotary frequencies are no weights and stay exact."""
    model, rounded = models.llama(num_hidden_layers=1), models.llama(num_hidden_layers=1)
    rounded.load_state_dict({k: v.to(dtype).float() for k, v in model.state_dict().items()})
    place = folder / str(dtype)
    model.to(dtype).save_pretrained(place)
    program = load_program(place)
    assert program.dtype == dtype
    assert {p.dtype for p in program.exported.state_dict.values()} == {dtype}
    ids = models.tokens(2, 6)
    with torch.no_grad():
        wide = original_scorer(program, widened(program.flat_module()))(ids)
        narrow = original_scorer(program)(ids)
        expected = rounded(ids).logits
    assert (wide.dtype, narrow.dtype) == (torch.float32, dtype)
    # Float32 throughout, at cosines that the model rounds to its own type: nothing but float32's roundings is left.
    torch.testing.assert_close(wide, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(narrow.float(), wide)


@pytest.mark.parametrize("names", [("input_ids",), ("input_ids", "attention_mask")], ids=str)
def test_archive_of_a_huggingface_model(folder, llama, names):
    ids = models.tokens(2, 5)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    path = save(llama, folder / f"llama-{len(names)}.pt2", {n: given[n] for n in names})
    program = load_program(path)
    assert_same_model(program, llama, **(MASK if "attention_mask" in names else {}))
    assert (program.in_memory, program.source) == (False, str(path))
    assert program.assets.folder is None  # no tokenizer lies beside the archive
    found = recognise(program)
    assert not found.rejections
    assert [s.path for s in found.sites] == ["model.layers.0.self_attn"]


def test_archive_with_a_cache_among_its_outputs(folder, llama, caplog):
    """The cache outputs are dropped with a word; the logits are found among all outputs."""

    class Cached(Wrapped):
        def forward(self, input_ids):
            result = self.inner(input_ids, use_cache=True)
            return [(layer.keys, layer.values) for layer in result.past_key_values.layers], result.logits

    path = save(Cached(llama).eval(), folder / "cached.pt2")
    program = load_program(path)
    assert_same_model(program, llama)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("mla_compile")]
    told = "the output 'output_1' is taken for the logits, and 'output_0_0_0' and 'output_0_0_1' are dropped"
    assert said == [f"{path}: {told}."]
    assert program.notes == (told,)
    assert len(recognise(program).sites) == 1


def test_archive_of_a_huggingface_model_with_its_cache_left_on(folder, llama):
    """torch saves such an archive, but cannot restore the constants in it: the remedy must say so."""
    path = folder / "dynamic-cache.pt2"
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import models, torch
from torch.export import Dim
from transformers.integrations.executorch import register_dynamic_cache_export_support
register_dynamic_cache_export_support()
model = models.llama(num_hidden_layers=1)
model.config.use_cache = True
shapes = {{"input_ids": {{0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}}}
exported = torch.export.export(model, (), {{"input_ids": models.tokens(2, 5)}}, dynamic_shapes=shapes)
torch.export.save(exported, {str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    error = refused(path)
    assert "cache" in error.message
    assert "use_cache = False" in error.remedy


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
def test_archive_of_a_handwritten_model(nano_file, nano, suffix):
    path = nano_file.with_suffix(suffix)
    if path != nano_file:
        shutil.copy(nano_file, path)
    program = load_program(str(path))
    assert_same_model(program, nano, tokens="idx")
    assert (program.in_memory, program.max_positions) == (False, None)
    assert len(recognise(program).sites) == models.LAYERS


def test_archive_of_a_model_with_complex_numbers(folder):
    module = models.handwritten(models.ComplexLlama)
    program = load_program(save(module, folder / "complex.pt2"))
    assert_same_model(program, module, tokens="tokens")
    assert len(recognise(program).sites) == models.LAYERS


def test_tokenizer_beside_an_archive_is_found(nano_file, tmp_path):
    tiny = Path(__file__).parents[1] / "examples" / "tiny-llama"
    shutil.copy(nano_file, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path)
    beside = load_program(tmp_path / nano_file.name).assets
    named = load_program(nano_file, tokenizer=str(tiny)).assets
    assert (beside.folder, named.folder) == (str(tmp_path), str(tiny))
    assert beside.generation == named.generation == {"bos_token_id": 0, "eos_token_id": 0}


def test_bounds_given_at_export_limit_the_length(folder, nano):
    shapes = ({0: Dim("batch", min=2, max=16), 1: Dim("length", min=3, max=100)},)
    path = save(nano, folder / "bounded.pt2", dynamic_shapes=shapes)
    assert load_program(path).max_positions == 100


def test_module_with_positional_inputs(nano):
    program = capture(nano, (models.tokens(2, 5),))
    assert_same_model(program, nano, tokens="idx")
    assert (program.in_memory, program.source, program.max_positions) == (True, "NanoGPT", None)


def test_module_with_keyword_inputs(llama):
    ids = models.tokens(2, 5)
    program = capture(llama, {"attention_mask": torch.ones_like(ids), "input_ids": ids})
    assert_same_model(program, llama, **MASK)
    assert program.max_positions == 128


@pytest.mark.parametrize("shape", [(1, 8), (1, 1)], ids=str)
def test_examples_of_size_one_do_not_become_constants(nano, shape):
    given = torch.zeros(shape, dtype=torch.long)
    assert_same_model(capture(nano, (given,)), nano, tokens="idx")
    assert given.shape == shape


def test_huggingface_module_needs_no_example_inputs_and_is_left_as_it_was():
    module = models.llama(num_hidden_layers=1, attention_dropout=0.5).train()
    module.config.use_cache = True
    before = {k: v.clone() for k, v in module.state_dict().items()}
    program = capture(module, None)
    assert module.training
    assert module.config.use_cache is True
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert_same_model(program, module.eval(), **MASK, **POSITIONS)  # without dropout


def test_every_part_of_a_module_keeps_its_mode(nano):
    """Also where the export fails."""
    module = copy.deepcopy(nano).train()
    module.norms[1].eval()
    module.attentions.eval()
    modes = {name: part.training for name, part in module.named_modules()}
    capture(module, (torch.zeros(2, 8, dtype=torch.long),))
    assert {name: part.training for name, part in module.named_modules()} == modes
    with pytest.raises(LoadError, match="cannot run on the example_inputs"):
        capture(module, ([[1, 2, 3]],))
    assert {name: part.training for name, part in module.named_modules()} == modes


def test_a_language_model_that_can_read_images_is_exported_with_tokens_only():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        module = transformers.FuyuForCausalLM(transformers.FuyuConfig(vocab_size=64, **sizes))
    assert {*plain_inputs(module)} == {"input_ids", "attention_mask", "position_ids"}


def test_exported_program(nano):
    exported = export(nano, (models.tokens(2, 5),), (DYNAMIC,))
    program = language_model(read_export(exported, source="mine"))
    assert_same_model(program, nano, tokens="idx")
    assert program.source == "mine"
    compiled = api.compile(exported, exact=True)
    ids = models.tokens(2, 11)
    with torch.no_grad():
        assert_close(compiled.module(ids).logits, models.logits(nano, ids))


def test_pickled_module_is_read_only_on_request(folder, nano):
    torch.save(nano, folder / "pickled.pt")
    with pytest.raises(LoadError, match="is a pickled module, and unpickling runs whatever code the file holds") as no:
        load_program(folder / "pickled.pt")
    assert no.value.remedy.endswith("Or pass --unsafe-load if you trust the file.")
    assert_same_model(load_program(folder / "pickled.pt", unsafe=True), nano, tokens="idx")


def test_refusing_a_pickled_module_runs_nothing_of_it(folder):
    mark = folder / "executed"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (mark,))

    torch.save(Trap(), folder / "trap.pt")
    with pytest.raises(LoadError, match="pickled module"):
        load_program(folder / "trap.pt")
    assert not mark.exists()


# ---- what is refused


def refused(source, **options) -> LoadError:
    """Load what cannot be loaded; the sentence is one line that names the source and ends in a remedy."""
    with pytest.raises(LoadError) as caught:
        load_program(source, **options)
    error = caught.value
    assert error.exit_code == 2
    assert "\n" not in str(error)
    assert "Traceback" not in str(error)
    assert str(source) in error.message
    assert error.message.endswith(".")
    assert error.remedy
    return error


@pytest.mark.parametrize("name", ["missing.pt2", "org/missing.onnx", "a/b/c", "./org/name", "/missing", "~/model"])
def test_missing_file_or_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(name)
    assert error.message == f"There is no file or folder '{name}'."
    assert error.remedy == "Give a .pt2 archive, a Hugging Face folder or a hub id."


@pytest.mark.parametrize(
    "name",
    ["nobody/nothing", "Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B", "a/b-Chat-v1.0", "gpt2", "missing"],
)
def test_unreachable_hub_id(name, tmp_path, monkeypatch):
    """A name may be one of the hub, with a dot or without an owner, or a mistyped one: both are said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused(name)
    told = f"There is no file or folder '{name}', and none of that name came from the hub (OSError: "
    assert error.message.startswith(told)
    assert "the hub can be reached" in error.remedy


def test_a_hub_without_network_is_asked_once(tmp_path, monkeypatch):
    """Its own library tries for half a minute, and says so at every try."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def fail(url: str, **_: object) -> None:
        asked.append(url)
        raise OSError(url)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    for _ in range(2):
        assert "none of that name came from the hub" in refused("nobody/asked").message
    assert [url.endswith("/nobody/asked/resolve/main/config.json") for url in asked] == [True]


def test_folder_without_config(tmp_path):
    error = refused(tmp_path)
    assert error.message == f"The folder '{tmp_path}' has no config.json."


@pytest.mark.parametrize("config", ["{}", "{", '{"model_type": "no-such-model"}', '{"model_type": "vit"}'])
def test_folder_with_a_config_of_something_else(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    assert "could not be loaded by transformers" in refused(tmp_path).message


@pytest.mark.parametrize("weights", ["half", "garbage", "missing", "pickled"])
def test_folder_with_unusable_weights(llama_folder, llama, tmp_path, weights):
    path = shutil.copytree(llama_folder, tmp_path / "model") / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if weights == "half":
        path.write_bytes(content[: len(content) // 2])
    elif weights == "garbage":
        path.write_bytes(b"garbage")
    elif weights == "pickled":
        torch.save(llama.state_dict(), path.with_name("pytorch_model.bin"))
    error = refused(path.parent)
    if weights in ("half", "garbage"):
        assert f"'{path}' is damaged or was cut short (" in error.message
    else:
        assert "could not be loaded by transformers (" in error.message
        assert "safetensors" in str(error)


def test_folder_whose_weights_lack_a_layer(llama_folder, tmp_path):
    """transformers fills what is missing with random numbers; a conversion of those is worth nothing."""
    from safetensors.torch import load_file, save_file

    path = shutil.copytree(llama_folder, tmp_path / "model") / "model.safetensors"
    weights = {k: v for k, v in load_file(path).items() if "layers.0.self_attn.k_proj" not in k}
    save_file(weights, path, metadata={"format": "pt"})
    error = refused(path.parent)
    assert "k_proj" in error.message


def test_converted_folder_is_not_converted_again(folder, nano):
    compiled = api.compile(nano, (models.tokens(2, 5),), method="mha2mla", cache_ratio=0.5)
    compiled.save(folder / "converted")
    error = refused(folder / "converted")
    assert error.message.endswith("is a model that was converted already.")
    assert error.remedy == "Give the model it was converted from instead."


@pytest.mark.parametrize("name", ["model.pt", "model.pt2"])
@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "zip-like"])
def test_file_that_only_has_the_name_of_an_archive(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    error = refused(tmp_path / name)
    assert error.message.endswith("is truncated or not a torch.export archive.")
    assert error.remedy.startswith(HOW_TO_EXPORT)


def test_file_that_is_not_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert refused(tmp_path / "notes.txt").message.endswith("is not a model.")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_archive(nano_file, tmp_path, kept):
    content = nano_file.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(content[: int(kept * len(content))])
    assert refused(tmp_path / "cut.pt2").message.endswith("is truncated or not a torch.export archive.")


def test_archive_without_its_beginning(nano_file, tmp_path):
    content = nano_file.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(content[len(content) // 2 :])
    refused(tmp_path / "cut.pt2")


def test_archive_with_damaged_weights(nano_file, tmp_path):
    """Wrong numbers in the middle of the file: its checksums say so, and nothing else would."""
    content = bytearray(nano_file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 1000] = bytes(1000)
    (tmp_path / "damaged.pt2").write_bytes(content)
    assert "damaged" in refused(tmp_path / "damaged.pt2").message


def test_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    assert refused(tmp_path / "photos.pt").message.endswith("is an archive but holds no model.")


def test_torchscript_file(nano, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but its files live on
        torch.jit.trace(nano, models.tokens(2, 5), check_trace=False).save(str(tmp_path / "script.pt"))
    error = refused(tmp_path / "script.pt")
    assert error.message.endswith("is a TorchScript file, whose graph cannot be rewritten.")
    assert error.remedy.startswith(HOW_TO_EXPORT)


@pytest.mark.parametrize("unsafe", [False, True])
def test_weights_without_a_model(nano, tmp_path, unsafe):
    torch.save(nano.state_dict(), tmp_path / "weights.pt")
    error = refused(tmp_path / "weights.pt", unsafe=unsafe)
    assert error.message.endswith("holds weights but no model that uses them.")
    assert error.remedy.startswith(HOW_TO_EXPORT)


def test_pickle_of_the_old_format_is_called_a_pickle(nano, tmp_path):
    torch.save(nano, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "pickle" in refused(tmp_path / "old.pt").message


def test_damaged_pickle(nano, tmp_path):
    torch.save(nano, tmp_path / "bad.pt")
    content = bytearray((tmp_path / "bad.pt").read_bytes())
    content[200:900] = b"\x01" * 700
    (tmp_path / "bad.pt").write_bytes(content)
    refused(tmp_path / "bad.pt", unsafe=True)


def test_onnx_file(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a")
    error = refused(tmp_path / "model.onnx")
    assert error.message.endswith("is an ONNX file, which cannot be converted.")
    assert error.remedy == "Give the model it was exported from instead."


class Plain(Wrapped):
    def forward(self, idx):
        return self.inner(idx)


@pytest.mark.parametrize(
    ("shapes", "phrase"),
    [
        (None, "static batch of 2"),
        (({1: Dim.DYNAMIC},), "static batch of 2"),
        (({0: Dim.DYNAMIC},), "static length of 5"),
    ],
    ids=["all", "batch", "length"],
)
def test_static_shapes(tmp_path, shapes, phrase):
    path = tmp_path / "static.pt2"
    torch.export.save(export(Plain(), (models.tokens(2, 5),), shapes), path)
    error = refused(path)
    assert error.message == f"'{path}' was exported with a {phrase}."
    assert "ids being a batch of at least 2 by 3 token ids" in error.remedy


class TwoTokens(Wrapped):
    def forward(self, first, second):
        return self.inner(first) + self.inner(second)


class TokenTypes(Wrapped):
    def forward(self, input_ids, token_type_ids):
        return self.inner(input_ids + 0 * token_type_ids)


class Embeddings(Wrapped):
    def forward(self, inputs_embeds):
        return self.inner[1](inputs_embeds)


class FloatMask(Wrapped):
    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids) * attention_mask[..., None]


class LastOnly(Wrapped):
    def forward(self, idx):
        return self.inner(idx)[:, -1]


class Choices(Wrapped):
    def forward(self, idx):
        return self.inner(idx).argmax(-1)


class TimeFirst(Wrapped):
    def forward(self, idx):
        return self.inner(idx).transpose(0, 1)


class Branching(Wrapped):
    def forward(self, idx):
        return self.inner(idx) * (2 if idx.sum() > 3 else 1)


IDS = models.tokens(2, 5)
MISFITS = [
    (TwoTokens, (IDS, IDS), "The inputs of 'TwoTokens' are first, second; which one holds the token ids is unclear."),
    (TokenTypes, (IDS, IDS), "The inputs of 'TokenTypes' are input_ids, token_type_ids; which one holds"),
    (Embeddings, (torch.zeros(2, 5, 8),), "Input 'inputs_embeds' of 'Embeddings' is float32 of rank 3."),
    (FloatMask, (IDS, torch.ones(2, 5)), "Input 'attention_mask' of 'FloatMask' is float32 of rank 2."),
    (LastOnly, (IDS,), "No output of 'LastOnly' is shaped [batch, length, vocabulary]."),
    (Choices, (IDS,), "No output of 'Choices' is shaped [batch, length, vocabulary]."),
    (TimeFirst, (IDS,), "No output of 'TimeFirst' is shaped [batch, length, vocabulary]."),
    (
        Branching,
        (IDS,),
        "Branching could not be exported: 'return self.inner(idx) * (2 if idx.sum() > 3 else 1)' (test_frontend.py:",
    ),
]


@pytest.mark.parametrize(("kind", "inputs", "phrase"), MISFITS, ids=lambda x: getattr(x, "__name__", ""))
def test_module_that_is_not_a_causal_language_model(kind, inputs, phrase):
    with pytest.raises(LoadError) as caught:
        capture(kind().eval(), inputs)
    assert caught.value.message.startswith(phrase)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy.endswith(".")


def test_a_failed_export_does_not_print_torch_internals(capfd, caplog):
    with pytest.raises(LoadError):
        capture(Branching().eval(), (IDS,))
    assert capfd.readouterr() == ("", "")


def test_module_without_example_inputs(nano):
    with pytest.raises(LoadError) as caught:
        capture(nano, None)
    assert caught.value.message == "NanoGPT was given without example_inputs."
    assert caught.value.remedy == "Pass token ids to export it with, e.g. (torch.zeros(2, 8, dtype=torch.long),)."


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(2, 8, dtype=torch.long), (torch.zeros(8, dtype=torch.long),), (), {"ids": IDS}],
    ids=["bare tensor", "one sequence", "nothing", "wrong name"],
)
def test_example_inputs_that_do_not_fit(nano, inputs):
    """The user's inputs are wrong, not an operation of the model: the remedy must not send them there."""
    with pytest.raises(LoadError) as caught:
        capture(nano, inputs)
    assert "\n" not in str(caught.value)
    assert "example_inputs" in str(caught.value)
    assert "Rewrite the named operation" not in caught.value.remedy


@pytest.mark.parametrize("tokenizer", ["missing", "empty"])
def test_tokenizer_that_is_not_there(nano_file, tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadError, match="tokenizer") as caught:
        load_program(nano_file, tokenizer=str(tmp_path / tokenizer))
    assert str(tmp_path / tokenizer) in caught.value.message
    assert caught.value.remedy == "Give one with --tokenizer FOLDER."
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["module", "program", "archive"])
@pytest.mark.parametrize("as_object", [False, True])
def test_what_ends_a_text_is_known_of_every_tokenizer(form, as_object, programs, tmp_path):
    """A model that never stops is of little use, however it and its tokenizer were given."""
    from transformers import AutoTokenizer

    captured, tokenizer = programs["llama-gqa"], AutoTokenizer.from_pretrained(TINY) if as_object else str(TINY)
    given, example = captured.program.exported, None
    if form == "module":
        given, example = Answering(captured.module), models.tokens(2, 8)
    if form == "archive":
        given = tmp_path / "model.pt2"
        torch.export.save(captured.program.exported, given)
    assets = load_source(ModelSource(given, example, tokenizer), any_kind=False).assets
    words = AutoTokenizer.from_pretrained(TINY)
    assert assets.generation == {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    assert (assets.folder, assets.tokenizer) == ((None, tokenizer) if as_object else (tokenizer, None))


class Answering(torch.nn.Module):
    """A model that transformers does not know."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids):
        return self.module(ids).logits


class TruthMasked(models.NanoGPT):
    """Padding is given as booleans, and hidden by a mask that is one."""

    def forward(self, tokens, mask):
        length = tokens.shape[1]
        x = self.tokens(tokens)
        seen = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None]
        for norm, attention in zip(self.norms, self.attentions, strict=False):
            q, k, v = (part.unflatten(-1, (models.HEADS, -1)) for part in attention.qkv(norm(x)).chunk(3, -1))
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
        return self.head(x)


def test_a_mask_of_booleans():
    """Oracle: the module itself; a converted model reads its mask as integers, like every other."""
    torch.manual_seed(0)
    module, ids = TruthMasked().eval(), models.tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    compiled = api.compile(module, (ids, mask.bool()), exact=True)
    with torch.no_grad():
        got, expected = compiled.module(ids, mask).logits, module(ids, mask.bool())
    assert (got - expected)[mask.bool()].abs().max() <= 1e-5 * expected.abs().max()  # float32 through two layers
