import argparse
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mmforget.checkpoint import (
    load_model,
    load_state,
    pack,
    read_state,
    save_model,
    save_state,
    state_sha,
    unpack,
)
from mmforget.errors import CheckpointError, ResourceError

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self, classes: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential()
        self.layer1.add_module("conv1", nn.Conv2d(4, 4, 3))
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def net(seed: int, classes: int = 8) -> Net:
    torch.manual_seed(seed)
    made = Net(classes)
    made.bn.get_buffer("running_mean").normal_()
    return made


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def test_round_trip(tmp_path: Path) -> None:
    model, other = net(0).to(memory_format=torch.channels_last), net(1)
    assert not equal(model, other)
    save_model(model, tmp_path / "m.safetensors", {"note": "x"})
    load_model(other, tmp_path / "m.safetensors")
    assert equal(model, other)
    assert state_sha(model) == state_sha(other)
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_shared_tensors(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    save_model(model, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size < 2 * 60 + 200
    load_model(other, tmp_path / "m.safetensors")
    assert torch.equal(other.head.weight, model.embed.weight)
    assert set(read_state(tmp_path / "m.safetensors")) == {"embed.weight", "head.weight"}
    # A file of another writer that says nothing of the second name.
    plain = {"embed.weight": torch.ones(5, 3)}
    safetensors.torch.save_file(plain, tmp_path / "plain.safetensors")
    load_model(other, tmp_path / "plain.safetensors")
    assert other.head.weight.eq(1).all()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("legacy", [True, False])
def test_pickles_of_tensors(tmp_path: Path, suffix: str, legacy: bool) -> None:
    model, other = net(0), net(1)
    path = tmp_path / f"m{suffix}"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    load_model(other, path)
    assert equal(model, other)


@pytest.mark.parametrize("nest", ["state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "backbone."])
def test_wrapped_checkpoints(tmp_path: Path, nest: str, prefix: str) -> None:
    model, other = net(0), net(1)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters()).state_dict()
    torch.save({nest: state, "epoch": 3, "optimizer": optimizer}, tmp_path / "m.pt")
    load_model(other, tmp_path / "m.pt")
    assert equal(model, other)


def test_prefix_of_a_wrapper_module(tmp_path: Path) -> None:
    """Published MUCAC classifiers keep their head in a wrapper: `fc.fc.weight`."""
    model, other = net(0), net(1)
    state = {k.replace("fc.", "fc.fc."): v for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    load_model(other, tmp_path / "m.pt")
    assert equal(model, other)


def test_ambiguous_prefix_is_not_guessed(tmp_path: Path) -> None:
    state = net(0).state_dict()
    weight = state.pop("fc.weight")
    torch.save(state | {"a.fc.weight": weight, "b.fc.weight": weight}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"1 missing \(fc\.weight\); 2 unexpected"):
        load_model(net(1), tmp_path / "m.pt")


def test_folders(tmp_path: Path) -> None:
    model = net(0)
    save_model(model, tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "run.json").write_text("{}")
    other = net(1)
    load_model(other, tmp_path / "run")
    assert equal(model, other)

    state = {k: v.clone() for k, v in model.state_dict().items()}
    names = list(state)
    shards = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    folder = tmp_path / "sharded"
    folder.mkdir()
    for file, held in shards.items():
        safetensors.torch.save_file({k: state[k] for k in held}, folder / file)
    index = {"weight_map": {k: file for file, held in shards.items() for k in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    other = net(1)
    load_model(other, folder)
    assert equal(model, other)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        load_model(other, folder)

    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="nothing"):
        read_state(tmp_path / "empty")


def changed(path: Path, kind: str) -> None:
    model = net(0)
    if kind == "truncated safetensors":
        save_model(model, path)
        path.write_bytes(path.read_bytes()[:-7])
    elif kind.startswith("truncated"):
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization="zip" in kind)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "no archive of tensors":
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "hello")
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "other content":
        torch.save({"epoch": 3, "history": [1.0]}, path)
    elif kind == "wrong suffix":
        path.write_text("x")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("truncated safetensors", "m.safetensors", "truncated or damaged"),
        ("empty", "m.safetensors", "truncated or damaged"),
        ("truncated zip", "m.pt", "truncated or damaged"),
        ("truncated legacy", "m.pt", "truncated or damaged"),
        ("no archive of tensors", "m.pt", "truncated or damaged"),
        ("text", "m.pt", "not a checkpoint"),
        ("empty", "m.pt", "not a checkpoint"),
        ("other content", "m.pt", "found epoch, history"),
        ("wrong suffix", "m.txt", "not a checkpoint by its name"),
        ("absent", "m.pt", "no such file"),
    ],
)
def test_unreadable_files(tmp_path: Path, kind: str, name: str, message: str) -> None:
    changed(tmp_path / name, kind)
    model = net(1)
    before = state_sha(model)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_model(model, tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert state_sha(model) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["zip", "legacy", "raw", "module", "namespace", "script"])
def test_pickles_with_code_are_not_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.pt"
    state: dict[str, Any] = {"state_dict": net(0).state_dict(), "extra": Evil()}
    if kind == "raw":
        path.write_bytes(pickle.dumps(state))
    elif kind == "module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "namespace":
        torch.save(state | {"extra": argparse.Namespace(lr=1)}, path)
    elif kind == "script":
        torch.jit.script(nn.Linear(2, 2)).save(str(path))  # type: ignore[no-untyped-call]
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="could run code") as raised:
        read_state(path)
    assert not (tmp_path / "pwned").exists()
    command = str(raised.value).partition('python -c "')[2].partition('"')[0]
    if kind in ("module", "namespace"):  # the advice in the message works
        exec(command, {})
        assert isinstance(next(iter(read_state(tmp_path / "m-weights.pt").values())), Tensor)


def test_another_head(tmp_path: Path) -> None:
    save_model(net(0, classes=10), tmp_path / "m.safetensors")
    model = net(1)
    before = state_sha(model)
    with pytest.raises(CheckpointError) as raised:
        load_model(model, tmp_path / "m.safetensors", strict=False)
    assert "2 of another shape (fc.weight [10, 4], the model's [8, 4]" in str(raised.value)
    assert "the head has 10 classes, the benchmark 8" in str(raised.value)
    assert state_sha(model) == before


def test_missing_and_unexpected(tmp_path: Path) -> None:
    state = net(0).state_dict()
    del state["fc.bias"]
    torch.save(state | {"aux.weight": torch.ones(1)}, tmp_path / "m.pt")
    model = net(1)
    before = state_sha(model)
    with pytest.raises(CheckpointError, match=r"1 missing \(fc\.bias\); 1 unexpected \(aux"):
        load_model(model, tmp_path / "m.pt")
    assert state_sha(model) == before
    load_model(model, tmp_path / "m.pt", strict=False)
    assert torch.equal(model.fc.weight, state["fc.weight"])

    torch.save({"x.y": torch.ones(1)}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_model(model, tmp_path / "none.pt", strict=False)


def test_half_precision_is_cast_and_integers_are_not(tmp_path: Path) -> None:
    model = net(0)
    torch.save({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"num_batches_tracked torch\.float16"):
        load_model(net(1), tmp_path / "m.pt")
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save(half, tmp_path / "m.pt")
    other = net(1)
    load_model(other, tmp_path / "m.pt")
    assert other.fc.weight.dtype == torch.float32
    assert torch.equal(other.fc.weight, model.fc.weight.half().float())


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_state_sha_sees_every_weight_and_buffer() -> None:
    model = net(0)
    shas = {state_sha(model)}
    for tensor in model.state_dict().values():
        flat = tensor.view(-1)
        flat[-1] += 1
        shas.add(state_sha(model))
    assert len(shas) == 1 + len(model.state_dict())
    assert state_sha(net(0)) == state_sha(net(0).to(memory_format=torch.channels_last))
    assert state_sha(nn.Linear(2, 2).bfloat16())
    assert state_sha(nn.Linear(0, 2, bias=False)) != state_sha(nn.Linear(2, 0, bias=False))


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save_model(net(0), path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_model", full)
    with pytest.raises(ResourceError, match="no space left"):
        save_model(net(1), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_pack_keeps_types() -> None:
    weight = torch.randn(3, 4)
    value: dict[Any, Any] = {
        "a": [1, 2.5, None, True, "x", (weight, weight[0], {})],
        0: {"nan": float("nan"), None: torch.tensor(3), False: weight.t()},
        "empty": torch.empty(0, 2),
    }
    tensors, skeleton = pack(value)
    back = unpack(safetensors.torch.load(safetensors.torch.save(contiguous(tensors))), skeleton)
    assert list(back) == ["a", 0, "empty"]
    assert back["a"][:5] == value["a"][:5]
    assert isinstance(back["a"][5], tuple)
    assert torch.equal(back["a"][5][0], weight)
    assert torch.equal(back["a"][5][1], weight[0])
    assert list(back[0]) == ["nan", None, False]
    assert back[0]["nan"] != back[0]["nan"]
    assert torch.equal(back[0][False], weight.t())
    assert back[0][None].shape == ()
    assert back["empty"].shape == (0, 2)


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def test_pack_refuses_other_types() -> None:
    for value in ({"a": [object()]}, {"a": {1.5: 2}}, {"a": {1, 2}}):
        with pytest.raises(CheckpointError, match="a"):
            pack(value)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_training_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Tied()
        options = {"momentum": 0.9} if name == "SGD" else {"betas": (0.8, 0.9)}
        return model, getattr(torch.optim, name)(model.parameters(), lr=0.1, **options)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model.head(model.embed(torch.arange(5))).logsumexp(1).sum().backward()  # type: ignore
            optimizer.step()

    whole, optimizer = start()
    steps(whole, optimizer, 6)
    half, optimizer = start()
    steps(half, optimizer, 3)
    for _ in range(2):  # the second replaces the first
        tensors, skeleton = pack({"model": half.state_dict(), "opt": optimizer.state_dict()})
        save_state(tmp_path, tensors, {"skeleton": skeleton, "step": 3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-2.safetensors", "state.json"]

    found = load_state(tmp_path)
    assert found is not None
    tensors, scalars = found
    state = unpack(tensors, scalars["skeleton"])
    rest, optimizer = start()
    steps(rest, optimizer, 1)
    rest.load_state_dict(state["model"])
    optimizer.load_state_dict(state["opt"])
    steps(rest, optimizer, 3)
    assert scalars["step"] == 3
    assert state_sha(rest) == state_sha(whole)
    assert optimizer.state_dict()["param_groups"][0].get("betas", (0.8, 0.9)) == (0.8, 0.9)


@pytest.mark.parametrize("damage", ["json", "torn", "gone", "short"])
def test_damaged_state_counts_as_none(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "nowhere") is None
    save_state(tmp_path, {"a": torch.ones(100)}, {})
    file = tmp_path / "state-1.safetensors"
    if damage == "json":
        (tmp_path / "state.json").write_text('{"file"')
    elif damage == "torn":
        file.write_bytes(b"\0" * file.stat().st_size)
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert load_state(tmp_path) is None
    assert "damaged" in caplog.text
    save_state(tmp_path, {"a": torch.zeros(1)}, {"step": 2})
    found = load_state(tmp_path)
    assert found is not None
    assert found[1] == {"step": 2}


@pytest.mark.parametrize("moment", ["state-2.safetensors", "state.json", "state-1.safetensors"])
def test_killed_while_saving_keeps_a_whole_state(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends right before the new tensors, the new mark, or the removal of the old tensors."""
    save_state(tmp_path, {"a": torch.full((2,), 1.0)}, {"step": 1})

    class Killed(BaseException):
        pass

    replace, unlink = Path.replace, Path.unlink

    def until_replace(self: Path, target: Path) -> Path:
        if target.name == moment:
            raise Killed
        return replace(self, target)

    def until_unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == moment:
            raise Killed
        unlink(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", until_replace)
        patch.setattr(Path, "unlink", until_unlink)
        save_state(tmp_path, {"a": torch.full((2,), 2.0)}, {"step": 2})
    found = load_state(tmp_path)
    assert found is not None
    step = 2 if moment == "state-1.safetensors" else 1
    assert found[1] == {"step": step}
    assert found[0]["a"].tolist() == [step, step]
    save_state(tmp_path, {"a": torch.ones(2)}, {"step": 3})
    assert len(list(tmp_path.iterdir())) == 2
