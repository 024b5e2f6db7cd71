"""Model files: a model as arrays and a program, which loads without the class of the model.

`NAME.safetensors` holds the arrays, `NAME.json` the evaluation and the training program, operation by operation. Reading one runs
nothing that a file brings along: no pickle, no code, operations by name from a white list (`program_json`, `json_values`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.arguments import checked
from sculpt.environment import versions
from sculpt.export.model_file.json_values import decode_shaped, shaped
from sculpt.export.model_file.loaded_model import LoadedApply, LoadedFunction, LoadedTrain, NoTraining
from sculpt.export.model_file.program_json import ProgramEncoder, decode_program
from sculpt.export.params import load_checksum, load_params, save_params
from sculpt.files import require_folder, written_whole
from sculpt.inputs import arrays_of
from sculpt.ir.any_batch import flatten_model, flatten_open
from sculpt.ir.program import Equation, FlatProgram, with_known_sizes
from sculpt.model import Model, Params, State
from sculpt.pruning.compaction.compactor import max_difference
from sculpt.pruning.compaction.random_inputs import draw_inputs
from sculpt.trees import leaf_parts, shapes_of

FORMAT = "sculpt model"
VERSION = 1
"""Of the JSON. Other versions are refused."""
TOLERANCE = 1e-5
"""Largest difference between the outputs of a model and of the one rebuilt, relative to the largest output."""

Parts = tuple[str | int, ...]
"""The path of an array in a tree: keys of mappings, places in sequences."""


@checked
def save_model(model: Model, path: str | Path, example_input: Any) -> None:
    """Writes a model, dense, compact or folded, to `NAME.safetensors` and `NAME.json`, from which `load_model` rebuilds it.

    The batch size stays open where the model's own code allows it, and is that of `example_input` otherwise. A model without a
    training mode, or with one that cannot be written, is saved without it; the file says why. The model is rebuilt from what is to
    be written and compared with the original first. Mappings in `params` and `state` become dictionaries, sequences lists.

    Args:
      model: the model.
      path: NAME, with one of the endings or without; in a folder that exists.
      example_input: array or `ShapeDtypeStruct` `[batch, ...]` that the model takes, or a pytree of them.

    Raises:
      ValueError: if the model does not take the input, returns other than one array, has an operation that cannot be written (the message
        names it and its line), or the rebuilt model's outputs differ; nothing is written then.
    """
    arrays_path, json_path = _paths(path)
    require_folder(json_path)
    example_input = arrays_of(example_input)
    document, constants = _document(model, example_input)
    arrays = {
        "params": _tree(document["params"], jax.tree.leaves(model.params)),
        "state": _tree(document["state"], jax.tree.leaves(model.state)),
        "constants": constants,
    }
    rebuilt = _rebuilt(json.loads(json.dumps(document)), lambda template: arrays)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(example_input))
    given = draw_inputs(shapes_of(example_input)) if abstract else jax.tree.map(jnp.asarray, example_input)
    difference = max_difference(model, rebuilt, given)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the rebuilt model differs from the original by {difference:.2e} of the largest output (at most {TOLERANCE} expected); "
            f"nothing was written to {json_path}"
        )
    save_params(arrays, arrays_path)
    # Until the JSON is there too, the arrays are those of no model.
    document["arrays_sha256"] = load_checksum(arrays_path)
    document["sha256"] = document_checksum(document)
    with written_whole(json_path) as temporary:
        temporary.write_text(json.dumps(document), encoding="utf-8")


def load_model(path: str | Path) -> Model:
    """Rebuilds a model from the two files that `save_model` wrote; the network's class is not needed.

    The result is called, differentiated, trained, traced, pruned, folded and exported like the model that was saved. Loading the
    same file twice gives functions that are equal, and hit the same compiled programs.

    Args:
      path: NAME, with one of the endings or without.

    Raises:
      ValueError: if a file is absent, damaged, of another version, or the two are not of one model.
    """
    arrays_path, json_path = _paths(path)
    if not json_path.is_file():
        raise ValueError(f"no such file: {json_path}")
    # What damaged text leads to is open, down to the rules of JAX's operations: any exception may come out of it.
    try:
        document = json.loads(json_path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f'"format" is not "{FORMAT}"')
        arrays_checksum, whole = document.get("arrays_sha256"), document_checksum(document)
    except Exception as error:
        raise ValueError(f"{json_path} is not a readable model file: {_line(error)}") from None
    if document.get("version") != VERSION:
        raise ValueError(
            f"{json_path} is of version {document.get('version')!r} of the format, this library reads {VERSION}: save the model again"
        )
    if document.get("sha256") != whole:
        raise ValueError(f"{json_path} is not a readable model file: it does not match its checksum")
    if load_checksum(arrays_path) != arrays_checksum or arrays_checksum is None:
        raise ValueError(f"{arrays_path} and {json_path} are not of the same model: save it again")
    try:
        return _rebuilt(document, lambda template: load_params(arrays_path, template))
    except Exception as error:
        raise ValueError(
            f"{json_path} is not a readable model file (written with JAX {document.get('jax')}): {_line(error)}"
        ) from None


def document_checksum(document: Mapping[str, Any]) -> str:
    """The SHA-256 of what a JSON says, but for that itself: against damage, not against forgery."""
    said = {name: value for name, value in document.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _line(error: Exception) -> str:
    """The first line of an exception's message."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return kind + (str(error).strip().splitlines() or ["no message"])[0]


def _paths(path: str | Path) -> tuple[Path, Path]:
    """Of the arrays and of the JSON."""
    path = Path(path)
    name = path.name.removesuffix(".json").removesuffix(".safetensors")
    return path.with_name(f"{name}.safetensors"), path.with_name(f"{name}.json")


def _document(model: Model, example_input: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the JSON says, but for the checksum of the arrays; and the constants."""
    encoder = ProgramEncoder()
    evaluation = encoder.program(flatten_model(model, example_input, derivatives=True))
    constants = dict(encoder.constants)
    reason = None
    try:
        training = encoder.program(_training_program(model, example_input))
    except ValueError as error:
        # Constants of what could not be written to the end are not kept.
        training, reason, encoder.constants = None, _line(error), constants
    document = {
        "format": FORMAT,
        "version": VERSION,
        "jax": jax.__version__,
        "sculpt": versions()["sculpt"],
        **_example(example_input),
        "description": list(model.describe()),
        "params": leaf_parts(model.params),
        "state": leaf_parts(model.state),
        "constants": {name: shaped(array) for name, array in encoder.constants.items()},
        "evaluation": evaluation,
        "training": training,
        "no_training": reason,
    }
    return document, encoder.constants


def _example(example_input: Any) -> dict[str, Any]:
    """Shape and dtype of the input; of several their paths too."""
    parts, leaves = leaf_parts(example_input), jax.tree.leaves(shapes_of(example_input))
    if parts == [()]:
        return {"example": shaped(leaves[0])}
    return {"example": [shaped(leaf) for leaf in leaves], "inputs": parts}


def _training_program(model: Model, example_input: Any) -> FlatProgram:
    """The program of the training function, whose new state comes leaf by leaf in the order of the old one."""
    paths = leaf_parts(model.state)

    def train(params: Params, state: State, x: jax.Array, key: jax.Array) -> list[Any]:
        logits, new = model.apply_train(params, state, x, key)
        found = dict(zip(leaf_parts(new), jax.tree.leaves(new)))
        if set(found) != set(paths):
            raise ValueError("its new state has other arrays than its state")
        return [logits, *(found[path] for path in paths)]

    key = jax.eval_shape(jax.random.key, 0)
    arrays = (model.params, model.state)
    program = flatten_open(train, arrays, example_input, key, derivatives=True)
    if len(program.outputs) != 1 + len(paths):
        raise ValueError("it returns other than one array beside the state")
    return program


def _rebuilt(document: Mapping[str, Any], read: Callable[[Any], Any]) -> Model:
    """The model of a document.

    Args:
      document: the JSON.
      read: gives the arrays, when it is shown a tree of the shapes that are expected.
    """
    constants = {name: jax.ShapeDtypeStruct(*decode_shaped(s)) for name, s in document["constants"].items()}
    paths = [tuple(map(tuple, document[kind])) for kind in ("params", "state")]
    values, inputs = document["evaluation"]["values"], document["evaluation"]["inputs"]
    images = tuple(map(tuple, document.get("inputs", [()])))
    if len(inputs) != len(paths[0]) + len(paths[1]) + len(images):
        raise ValueError(f"{len(inputs)} inputs of a program for {len(paths[0]) + len(paths[1])} arrays")
    expected = [jax.ShapeDtypeStruct(*decode_shaped(values[i])) for i in inputs[: -len(images)]]
    template = {
        "params": _tree(paths[0], expected[: len(paths[0])]),
        "state": _tree(paths[1], expected[len(paths[0]) :]),
        "constants": constants,
    }
    arrays = read(template)
    params, state = arrays["params"], arrays["state"]
    places = range(len(expected))
    placed = (_tree(paths[0], places[: len(paths[0])]), _tree(paths[1], places[len(paths[0]) :]))
    # Dictionaries are in the order of their keys, whatever the original was.
    leaf_of = {place: leaf for leaf, place in enumerate(jax.tree.leaves(placed))}
    order = tuple(leaf_of[place] for place in places)
    structure, digest = jax.tree.structure((params, state)), _digest(document, arrays["constants"])
    shapes = document["example"] if "inputs" in document else [document["example"]]
    example = _tree(images, [jax.ShapeDtypeStruct(*decode_shaped(text)) for text in shapes])

    program = decode_program(document["evaluation"], arrays["constants"])
    rows = tuple(map(str, document["description"]))
    apply = LoadedApply(digest, program, structure, order, images, rows)
    _check(apply, params, state, example)
    if document["training"] is None:
        return Model(apply, NoTraining(str(document["no_training"])), params, state)
    training = decode_program(document["training"], arrays["constants"])
    train = LoadedTrain(digest, training, structure, order, images)
    key = train.program.avals[train.program.inputs[-1]]
    _check(train, params, state, example, jax.ShapeDtypeStruct(key.shape, key.dtype))
    return Model(apply, train, params, state)


def _check(function: LoadedFunction, params: Params, state: State, *rest: Any) -> None:
    """Runs a function on shapes alone and compares those of every operation with what the program says."""
    program = with_known_sizes(function.program, jax.tree.leaves(rest[0])[0].shape[0])

    def compare(eqn: Equation, results: Sequence[Any]) -> None:
        for value, result in zip(eqn.outputs, results, strict=True):
            if shaped(result) != shaped(program.avals[value]):
                raise ValueError(
                    f"{eqn.name} gives {shaped(result)}, where the program says {shaped(program.avals[value])}"
                )

    found = jax.eval_shape(lambda *a: function.run(*a, observe=compare), params, state, *rest)
    state_shapes = [shaped(leaf) for leaf in map(shapes_of, jax.tree.leaves(state))]
    expected = sorted(state_shapes) if len(rest) > 1 else []
    if sorted(map(shaped, found[1:])) != expected or not found:
        raise ValueError(f"a program that gives {len(found)} arrays of other shapes than the state has")


def _tree(paths: Sequence[Sequence[str | int]], leaves: Sequence[Any]) -> Any:
    """Dictionaries and lists with leaves at these paths.

    Raises:
      ValueError: if the paths are of no such tree.
    """
    if len(paths) != len(leaves):
        raise ValueError(f"{len(paths)} paths for {len(leaves)} arrays")
    if len(paths) == 1 and not paths[0]:
        return leaves[0]
    branches: dict[str | int, list[tuple[Sequence[str | int], Any]]] = {}
    for path, leaf in zip(paths, leaves):
        if not path or type(path[0]) not in (str, int):
            raise ValueError(f"the path {list(path)!r} beside others")
        branches.setdefault(path[0], []).append((path[1:], leaf))
    grown = {key: _tree(*zip(*inner)) for key, inner in branches.items()}
    if grown and all(isinstance(key, int) for key in grown) and sorted(grown) == list(range(len(grown))):  # type: ignore[type-var]
        return [grown[key] for key in range(len(grown))]
    return {str(key): value for key, value in grown.items()}


def _digest(document: Mapping[str, Any], constants: Mapping[str, Any]) -> str:
    parts = ("params", "state", "inputs", "evaluation", "training")
    said = {name: document[name] for name in parts if name in document}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(constants):
        array = constants[name]
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        digest.update(f"{name} {shaped(array)}".encode())
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()
