import base64
import functools
import operator
import os
import pickle
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import nn

from diffbir.utils.config import ROOT, ConfigError, check_keys, instantiate, load_config, project_path

Writer = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Writes a text, dedented, below a temporary folder and returns its path."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


def refused(*fragments: object):
    """Expects a ConfigError of one line whose text holds all fragments, in order."""
    return pytest.raises(ConfigError, match=".*".join(re.escape(str(f)) for f in fragments))


# Includes and interpolation


def test_later_includes_win_over_earlier_ones_and_the_file_itself_over_all(write):
    write("first.yaml", "{a: 1, b: 1, c: 1, nested: {kept: 1, changed: 1}}")
    write("second.yaml", "{b: 2, c: 2, nested: {changed: 2}}")
    main = write("main.yaml", "{include: [first.yaml, second.yaml], c: 3, own: 4}")
    assert load_config(main) == {"a": 1, "b": 2, "c": 3, "nested": {"kept": 1, "changed": 2}, "own": 4}


def test_lists_are_replaced_and_not_joined(write):
    write("base.yaml", "depths: [6, 6, 6]")
    assert load_config(write("main.yaml", "{include: base.yaml, depths: [2]}")) == {"depths": [2]}


def test_includes_are_relative_to_the_file_that_names_them(write, tmp_path, monkeypatch):
    """The working folder holds files of the same names, which must not be taken."""
    write("b/deep/leaf.yaml", "x: leaf")
    write("b/base.yaml", "include: deep/leaf.yaml")
    main = write("a/main.yaml", "include: ../b/base.yaml")
    write("cwd/deep/leaf.yaml", "x: wrong")
    monkeypatch.chdir(tmp_path / "cwd")
    assert load_config(main) == {"x": "leaf"}


def test_one_file_may_be_included_twice_if_there_is_no_circle(write):
    write("shared.yaml", "x: 1")
    write("left.yaml", "include: shared.yaml")
    write("right.yaml", "{include: shared.yaml, y: 2}")
    assert load_config(write("main.yaml", "include: [left.yaml, right.yaml]")) == {"x": 1, "y": 2}


@pytest.mark.parametrize("include", ["null", "[]"])
def test_an_include_without_files_adds_nothing(write, include):
    assert load_config(write("main.yaml", f"{{include: {include}, a: 1}}")) == {"a": 1}


def test_interpolation_reaches_across_includes_in_both_directions(write):
    write("base.yaml", "{width: 8, doubled: '${shared.from_main}'}")
    main = write("main.yaml", "{include: base.yaml, shared: {from_main: 16}, net: {params: {dim: '${width}'}}}")
    config = load_config(main)
    assert config.doubled == 16
    assert config.net.params.dim == 8


def test_interpolation_sees_the_value_that_wins(write):
    write("base.yaml", "{lr: 1, optimizer: {lr: '${lr}'}}")
    main = write("main.yaml", "{include: base.yaml, lr: 2}")
    assert load_config(main).optimizer.lr == 2
    assert load_config(main, ["lr=3"]).optimizer.lr == 3


def test_interpolated_nodes_are_resolved_to_plain_values(write):
    config = load_config(write("main.yaml", "{net: {depths: [2, 2]}, again: '${net}'}"))
    config.net.depths = [1]
    assert config.again.depths == [2, 2]


@pytest.mark.parametrize("include", ["3", "{a: base.yaml}", "[3]"])
def test_an_include_that_is_not_a_list_of_paths_is_refused(write, include):
    path = write("main.yaml", f"{{include: {include}, a: 1}}")
    with refused(path, "include"):
        load_config(path)


def test_a_circle_of_includes_is_named(write):
    write("a.yaml", "include: b.yaml")
    write("b.yaml", "include: c.yaml")
    path = write("c.yaml", "include: a.yaml")
    with refused("a.yaml includes itself through", path):
        load_config(path.parent / "a.yaml")


def test_a_file_that_includes_itself_is_refused(write):
    path = write("self.yaml", "include: self.yaml")
    with refused(path, "includes itself"):
        load_config(path)


def test_a_missing_include_is_named_with_the_file_that_wants_it(write):
    path = write("main.yaml", "include: gone.yaml")
    with refused("gone.yaml", f"included by {path}"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path):
    with refused("no configuration file", tmp_path / "gone.yaml"):
        load_config(tmp_path / "gone.yaml")


@pytest.mark.parametrize("text", ["a: [1", "a: 1\n\tb: 2", "- 1\n- 2"])
def test_a_file_that_is_not_a_yaml_mapping_is_named(write, text):
    path = write("bad.yaml", text)
    with refused(path):
        load_config(path)


def test_a_binary_file_is_named(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(bytes(range(128, 256)))
    with refused(path):
        load_config(path)


def test_an_interpolation_that_leads_nowhere_is_named(write):
    path = write("main.yaml", "{net: {dim: '${width}'}}")
    with refused(path, "net.dim", "width"):
        load_config(path)


def test_an_open_value_is_named_with_the_override_that_gives_it(write):
    path = write("main.yaml", "trainer:\n  params:\n    max_steps: ???")
    with refused("trainer.params.max_steps has no value", "trainer.params.max_steps=..."):
        load_config(path)
    assert load_config(path, ["trainer.params.max_steps=7"]).trainer.params.max_steps == 7


def test_an_open_value_is_named_and_not_a_key_that_reuses_it(write):
    """Giving `a_copy` on the command line would leave `source` open."""
    path = write("main.yaml", "a_copy: ${source}\nsource: ???")
    with refused("source has no value", "source=..."):
        load_config(path)


# Overrides

BASE = """
    lr: 1.0
    name: run
    resume: null
    net:
      params: {depths: [2, 2], dim: 8}
    callbacks:
      - params: {decay: 0.9}
"""


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("net.params.dim=16", "net.params.dim", 16),
        ("lr=1e-4", "lr", 1e-4),
        ("lr=null", "lr", None),
        ("resume=auto", "resume", "auto"),
        ("net.params.depths=[6,4]", "net.params.depths", [6, 4]),
        ("net.params.depths.1=5", "net.params.depths.1", 5),
        ("net.params.depths=[]", "net.params.depths", []),
        ("callbacks.0.params.decay=0.5", "callbacks.0.params.decay", 0.5),
        ("net.params={dim: 4}", "net.params", {"dim": 4}),
        ("name=a=b", "name", "a=b"),
        ("name=/data/two words", "name", "/data/two words"),
        ("name='7'", "name", "7"),
        ("name=true", "name", True),
    ],
)
def test_an_override_sets_exactly_one_key(write, override, key, value):
    path = write("main.yaml", BASE)
    expected = OmegaConf.to_container(load_config(path))
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    functools.reduce(operator.getitem, parents, expected)[last] = value
    assert load_config(path, [override]) == expected


def test_the_last_of_several_overrides_wins(write):
    assert load_config(write("main.yaml", BASE), ["lr=2", "name=x", "lr=3"]) == {
        **load_config(write("main.yaml", BASE)),
        "lr": 3,
        "name": "x",
    }


@pytest.mark.parametrize(
    "override, fragments",
    [
        ("lrr=1", ["unknown key 'lrr'", "did you mean 'lr'"]),
        ("net.parms.dim=1", ["unknown key 'net.parms'", "net.parms.dim", "did you mean 'params'"]),
        ("net.params.depths.2=1", ["unknown key 'net.params.depths.2'", "known here: 0, 1"]),
        ("lr.value=1", ["unknown key 'lr.value'"]),
        ("resume.value=1", ["unknown key 'resume.value'"]),
    ],
)
def test_an_override_of_an_unknown_key_is_refused_with_its_full_path_and_a_hint(write, override, fragments):
    with refused(*fragments):
        load_config(write("main.yaml", BASE), [override])


def test_an_override_may_name_a_parameter_that_the_yaml_leaves_at_its_default(write):
    """Whether it exists, the constructor knows."""
    path = write("main.yaml", "net: {target: model.networks.unet.UNet, params: {in_channels: 4}}")
    assert load_config(path, ["net.params.model_channels=32"]).net.params.model_channels == 32
    with refused("unknown key 'net.params.model_channelz'", "did you mean 'model_channels'"):
        instantiate(load_config(path, ["net.params.model_channelz=32"]).net, "net")


@pytest.mark.parametrize("override", ["lr", "=1", "--lr", "", "lr 1"])
def test_an_override_that_is_not_key_value_is_refused(write, override):
    with refused(f"'{override}' is not of the form key=value"):
        load_config(write("main.yaml", BASE), [override])


@pytest.mark.parametrize("override", ["net.params.depths=[1", "name={a: 1", "name=\t@"])
def test_an_override_whose_value_is_not_yaml_is_refused(write, override):
    with refused(override):
        load_config(write("main.yaml", BASE), [override])


def test_a_preset_is_found_from_any_folder(tmp_path, monkeypatch):
    """A file in the working folder comes first, then the project's."""
    monkeypatch.chdir(tmp_path)
    name = "configs/dataset/codeformer.yaml"
    assert project_path(name) == ROOT / name
    assert "degradation" in load_config(name)
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("mine: 1")
    assert load_config(name) == {"mine": 1}
    assert project_path(ROOT / "gone") == ROOT / "gone"


# Top-level keys


def test_check_keys_names_the_first_unknown_and_missing_key(write):
    config = load_config(write("main.yaml", "{networks: 1, sed: 2}"))
    with refused("unknown key 'sed'", "did you mean 'seed'"):
        check_keys(config, ["networks", "seed"])
    with refused("missing key 'data'", "networks, data"):
        check_keys(config, ["networks", "data"], optional=["sed"])
    check_keys(config, ["networks"], optional=["sed", "absent"])


# Building objects


def test_arguments_are_built_before_the_object_that_takes_them():
    node = {
        "target": "torch.nn.TransformerEncoder",
        "params": {
            "num_layers": 2,
            "enable_nested_tensor": False,
            "norm": {"target": "torch.nn.LayerNorm", "params": {"normalized_shape": [8]}},
            "encoder_layer": {
                "target": "torch.nn.TransformerEncoderLayer",
                "params": {"d_model": 8, "nhead": 2, "dropout": 0.5},
            },
        },
    }
    encoder = instantiate(node)
    assert isinstance(encoder, nn.TransformerEncoder)
    assert isinstance(encoder.norm, nn.LayerNorm)
    assert [layer.dropout.p for layer in encoder.layers] == [0.5, 0.5]


def test_lists_and_mappings_keep_their_shape_and_plain_values_are_returned_as_they_are():
    built = instantiate({"layers": [{"target": "torch.nn.ReLU"}, {"a": {"target": "torch.nn.GELU"}}, 3, "x", None]})
    assert isinstance(built["layers"][0], nn.ReLU)
    assert isinstance(built["layers"][1]["a"], nn.GELU)
    assert built["layers"][2:] == [3, "x", None]
    thing = object()
    assert instantiate(thing) is thing


def test_a_loaded_configuration_builds_with_its_interpolations(write):
    path = write(
        "main.yaml",
        """
        width: 5
        net:
          target: torch.nn.Linear
          params: {in_features: "${width}", out_features: 2, bias: false}
        """,
    )
    net = instantiate(load_config(path, ["width=7"]).net, "net")
    assert net.weight.shape == (2, 7)
    assert net.bias is None


def test_partial_leaves_a_callable_whose_params_are_built():
    partial = instantiate({"target": "torch.optim.SGD", "partial": True, "params": {"lr": 0.25, "momentum": 0.5}})
    assert isinstance(partial, functools.partial)
    optimizer = partial([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.25
    assert optimizer.defaults["momentum"] == 0.5


def test_each_call_builds_a_new_object_and_leaves_the_node_alone():
    node = {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 3}}
    assert instantiate(node) is not instantiate(node)
    assert node == {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 3}}


@pytest.mark.parametrize("partial", [False, True])
def test_an_unknown_parameter_is_named_with_its_full_path(partial):
    net = {"target": "torch.nn.Linear", "partial": partial, "params": {"in_feature": 2, "out_features": 3}}
    with refused("unknown key 'nets.main.blocks[1].params.in_feature' for Linear", "did you mean 'in_features'"):
        instantiate({"main": {"blocks": [{"target": "torch.nn.ReLU"}, net]}}, "nets")


def test_an_unknown_parameter_of_an_argument_is_named_with_its_full_path():
    sampler = {"target": "torch.nn.ReLU", "params": {"inplce": True}}
    node = {"target": "torch.utils.data.DataLoader", "params": {"dataset": [1], "sampler": sampler}}
    with refused("'data.params.sampler.params.inplce' for ReLU", "did you mean 'inplace'"):
        instantiate(node, "data")


def test_a_missing_parameter_is_named_unless_the_node_is_partial():
    node = {"target": "torch.nn.Linear", "params": {"in_features": 2}}
    with refused("missing key 'net.params.out_features'", "Linear"):
        instantiate(node, "net")
    assert instantiate({**node, "partial": True}, "net")(out_features=3).weight.shape == (3, 2)


def test_an_unknown_key_beside_target_is_refused():
    with refused("unknown key 'net.parms'", "'params' and 'partial'"):
        instantiate({"target": "torch.nn.ReLU", "parms": {}}, "net")


def test_params_that_are_not_a_mapping_are_refused():
    for params in ([1], 5, "abc"):
        with refused("net.params"):
            instantiate({"target": "torch.nn.Identity", "params": params}, "net")


def test_what_the_constructor_refuses_is_told_with_the_path_and_its_reason():
    node = {"target": "model.networks.swinir.SwinIR", "params": {"upsampler": "wrong"}}
    with refused("networks.stage1: model.networks.swinir.SwinIR", "upsampler must be one of"):
        instantiate(node, "networks.stage1")


@pytest.mark.parametrize("target", ["torch.nn.Convv2d", "model.networks.swinir.SwinIr", "model.swinr.SwinIR"])
def test_a_typo_in_a_target_is_named_with_its_path(target):
    with refused("net.target", f"there is no '{target}'"):
        instantiate({"target": target}, "net")


@pytest.mark.parametrize("target", [5, None, ["torch.nn.ReLU"], "torch.nn..Linear", "torch.nn.", ".", "a b"])
def test_a_target_that_is_not_a_name_is_refused(target):
    with refused("net.target"):
        instantiate({"target": target}, "net")


def targets(node: Any) -> Iterator[str]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and isinstance(node.get("target"), str):  # a parameter may have that name, too
        yield node["target"]
    for child in children:
        yield from targets(child)


def test_every_target_of_the_shipped_configurations_is_found():
    """What is refused below must not cost anything that is needed."""
    names = {t for path in (ROOT / "configs").rglob("*.yaml") for t in targets(yaml.safe_load(path.read_text()))}
    assert len(names) > 10
    for name in sorted(names):
        assert callable(instantiate({"target": name, "partial": True}).func)


# A configuration from a stranger must not run anything


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f'touch "{self.mark}"',)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


def attack(target: str, mark: Path, tmp_path: Path) -> dict[str, Any]:
    """Parameters with which `target` would create `mark` if it were called."""
    touch = f'touch "{mark}"'
    code = f"open({str(mark)!r}, 'w')"
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "hubconf.py").write_text(f"{code}\ndef net(): ...")
    (folder / "evil_module.py").write_text(f"{code}\ndef run(): ...")
    (folder / "source.txt").write_text("text")
    torch.save(Payload(mark), folder / "evil.pt")
    match target.rsplit(".", 1)[-1]:
        case "system":
            return {"command": touch}
        case "run" if "subprocess" in target:
            return {"args": ["touch", str(mark)]}
        case "eval" | "exec":
            return {"source": code}
        case "load" if "hub" in target:
            return {"repo_or_dir": str(folder), "model": "net", "source": "local"}
        case "load" if "cpp_extension" in target:
            return {"name": "evil", "sources": [str(folder / "evil.cpp")], "build_directory": str(mark.parent)}
        case "load":
            return {"f": str(folder / "evil.pt"), "weights_only": False}
        case "import_module":
            return {"name": "evil_module"}
        case "instantiate_class":
            return {"args": touch, "init": {"class_path": "os.system"}}
        case "basichandlers":
            return {"extension": "pickle", "data": pickle.dumps(Payload(mark))}
        case "download_url":
            return {"url": (folder / "source.txt").as_uri(), "root": str(mark.parent), "filename": mark.name}
        case "write_text":
            return {"data": "text"}
    return {}


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    "target",
    [
        # outside of what may be built
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "builtins.exec",
        "importlib.import_module",
        "torch.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "evil_module.run",
        "modelling.run",
        # inside by name, outside by what it leads to
        "torch.nn.functional.torch.hub.load",
        "torch.nn.modules.module.torch.load",
        "utils.config.importlib.import_module",
        "utils.config.functools.partial",
        "utils.config.Path",
        "utils.config.ROOT.write_text",
        "model.training.run.subprocess.run",
        "utils.image.os.system",
        "model.networks.swinir.torch.load",
        "model.networks.swinir.SwinIR.__init__.__globals__.get",
        "model.networks.swinir.SwinIR.__subclasses__",
        "model.networks.swinir.SwinIR.__class__",
        # inside, but they run or write what they are told to
        "pytorch_lightning.cli.instantiate_class",
        "torch.utils.data.datapipes.utils.decoder.basichandlers",
        "torchvision.datasets.utils.download_url",
    ],
)
def test_a_target_that_could_run_anything_is_refused_and_not_run(target, partial, mark, tmp_path, monkeypatch):
    params = attack(target, mark, tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "evil")
    with refused("net.target", f"'{target}'"):
        instantiate({"target": target, "params": params, "partial": partial}, "net")
    assert not mark.exists()


def test_refused_targets_are_refused_before_their_arguments_are_built(mark, tmp_path):
    """Arguments are built first, so an allowed one inside a refused one must wait for the check."""
    inner = {"target": "model.weights.checkpoint.save_weights", "params": {"state": {}, "path": str(mark)}}
    with refused("net.target", "os.system"):
        instantiate({"target": "os.system", "params": {"command": inner}}, "net")
    assert not mark.exists()


@pytest.mark.parametrize(
    "target", ["model.networks.swinir.RGB_MEAN", "utils.config.ROOT", "torch.nn.functional", "model", ""]
)
def test_a_target_that_is_not_a_class_or_function_is_refused(target):
    with refused("net.target", f"'{target}' is refused"):
        instantiate({"target": target}, "net")


def test_a_yaml_file_with_python_tags_or_a_binary_pickle_does_not_run_it(write, mark):
    data = base64.b64encode(pickle.dumps(Payload(mark))).decode()
    load_config(write("binary.yaml", f"x: !!binary {data}"))
    path = write("tag.yaml", f"x: !!python/object/apply:os.system ['touch {mark}']")
    with refused(path):
        load_config(path)
    assert not mark.exists()


def test_a_misspelt_key_is_found_through_a_subclass_that_hands_keys_on():
    """`UNet` takes the dimensions of its base by **kwargs; a typo there must still be named by its full path."""
    node = OmegaConf.create({"target": "model.networks.unet.UNet", "params": {"model_channelz": 32}})
    with pytest.raises(ConfigError, match=r"networks\.unet\.params\.model_channelz.*did you mean 'model_channels'"):
        instantiate(node, "networks.unet")
    partial = OmegaConf.create(
        {"target": "model.training.stage1.Stage1", "partial": True, "params": {"optimiser": None}}
    )
    with pytest.raises(ConfigError, match=r"module\.params\.optimiser"):
        instantiate(partial, "module")


# Paths

NAMES = [
    *("2024", "1e3", "0x10", "1_000", "012", "1.50", "true", "no", "~", "2019-05-01", "12:30:00", "", "a #1", "#1"),
    *(
        "Trip: Rome",
        "[2019] x",
        "[2019]",
        "{2019}",
        "{000..003}.tar",
        "{a",
        "- x",
        "a: b: c",
        "x=y",
        "'t Hooft",
        "*",
        "&a",
    ),
]
PATH_KEYS = [
    "photos",
    "val_photos",
    "run_dir",
    "resume",
    "weights",
    "weights.unet",
    "data.params.source",
    "data.params.path",
]
PATHS_YAML = """
photos: ???
val_photos: null
run_dir: runs/a
resume: null
weights: {unet: null}
data: {target: dataset.pairs.ImagePairs, params: {source: "${photos}"}}
"""


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_the_text_as_it_stands(write, key, name):
    config = load_config(write("a.yaml", PATHS_YAML), ["photos=x", f"{key}={name}"])
    assert OmegaConf.select(config, key) == name
    if key == "photos":
        assert config.data.params.source == name
        saved = write("saved.yaml", OmegaConf.to_yaml(config))
        assert load_config(saved).photos == name


def test_a_path_may_be_nothing_quoted_a_list_or_an_object(write):
    path = write("a.yaml", PATHS_YAML)
    source = "{target: dataset.sources.files.Files, params: {source: '2024'}}"
    config = load_config(
        path, [f"photos={source}", "resume=null", "weights={unet: a.pth}", "data.params.source=[a, b]"]
    )
    assert config.photos.params.source == "2024"
    assert config.resume is None
    assert config.weights == {"unet": "a.pth"}
    assert config.data.params.source == ["a", "b"]
    assert load_config(path, ["photos='2024'"]).photos == "2024"


def test_a_folder_that_is_there_is_meant(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write("a.yaml", PATHS_YAML)
    for name in ("[old]", "{a: b}", "'q'"):
        (tmp_path / name).mkdir()
        assert load_config(path, [f"photos={name}"]).photos == name


@pytest.mark.parametrize("value", ["2024", "1e3", "true", "[2019]"])
@pytest.mark.parametrize("key", ["photos", "run_dir", "weights.unet"])
def test_a_path_in_a_file_that_yaml_reads_as_something_else_is_named(write, key, value):
    text = PATHS_YAML.replace("photos: ???", "photos: x")
    old = {"photos": "photos: x", "run_dir": "run_dir: runs/a", "weights.unet": "unet: null"}[key]
    path = write("a.yaml", text.replace(old, f"{old.partition(':')[0]}: {value}"))
    with refused(path, f"{key} is read as", "put the path in quotes"):
        load_config(path)


def test_other_values_are_still_yaml(write):
    config = load_config(
        write("a.yaml", "{lr: 1, flip: false, n: 3, sizes: []}"), ["lr=1e-3", "flip=true", "sizes=[1, 2]"]
    )
    assert config == {"lr": 1e-3, "flip": True, "n": 3, "sizes": [1, 2]}
