"""One contract for every strategy in conf/strategy, found there; who cannot keep a rule says why."""

import copy
import json
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from omegaconf import OmegaConf
from simulations import SMALL, TASKS, Simulation, configuration

from clfed.config import choices, compose
from clfed.errors import ClfedError
from clfed.federated.answering import answer
from clfed.federated.client_app import app
from clfed.federated.grid import LocalGrid
from clfed.federated.wire import record_bytes
from clfed.jobs import federated, federated_summary
from clfed.jobs.method import make_method, method_name, state_digest
from clfed.jobs.settings import check_federated
from clfed.learners.fine_tuning import FineTuning
from clfed.reporting.results import validate
from clfed.strategies.prototype_averaging import PrototypeAveraging

NAMES = [name for name, _ in choices("strategy")]
TRAINING = [name for name in NAMES if "local" in configuration(f"strategy={name}")["strategy"]]
# Sizes that fit ten classes of twenty images; nothing that changes what a method is.
SMALL_SETTINGS = {
    "mfcl": {"steps": 2, "batch_size": 8, "code": 8, "width": 4, "local.synthetic_batch_size": 8},
    "target": {
        "images": 16,
        "batch_size": 8,
        "steps": 2,
        "warmup": 1,
        "student_steps": 2,
        "code": 8,
        "width": 4,
        "local.synthetic_batch_size": 8,
    },
}


@pytest.fixture(autouse=True, scope="module")
def identity():
    """Flower refuses to build messages in a process without one; a grid gives it."""
    LocalGrid(ClientApp(), [])


def small(name: str) -> list[str]:
    settings = {**({"local.epochs": 1} if name in TRAINING else {}), **SMALL_SETTINGS.get(name, {})}
    return [f"strategy={name}", *(f"strategy.{key}={value}" for key, value in settings.items())]


def world_of(folder, name: str, *more: str, **options) -> Simulation:
    return Simulation.of(folder, *small(name), *more, **options)


def state(world: Simulation) -> str:
    """The server's state, to the bit."""
    return state_digest(world.arrays)


def answers(world: Simulation) -> np.ndarray:
    """Names for every test image, one row for each model that answers."""
    strategy, plan = world.strategy, world.field.plan
    last = plan.rounds * strategy.rounds_per_mission
    images = plan.test.images[plan.asked(plan.rounds)]
    if isinstance(strategy, PrototypeAveraging):
        classifier = strategy.classifier()
        named = [(classifier.classes, classifier.predict(world.encoder.embed(images)))]
    elif not strategy.personal:
        network = strategy.network(world.arrays)
        named = [(network.classes, network.predict(images))]
    else:
        ids = sorted(world.grid.get_node_ids())
        messages = strategy.requests(last, world.arrays, ConfigRecord(), ids, "query.predict")
        replies = [reply.content for reply in world.grid.send_and_receive(messages)]
        named = [
            (json.loads(r["status"]["classes"]), r["answers"]["predicted"].numpy()) for r in replies
        ]
    return np.stack([np.array(classes)[np.asarray(rows)] for classes, rows in named])


# The job


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Run ``job=federated`` without its figures: ``results``."""
    for figure in ("accuracy_curves", "bytes_curve"):
        monkeypatch.setattr(federated_summary, figure, lambda results, path: path.touch())
    runs = 0

    def run(*overrides: str) -> dict:
        nonlocal runs
        runs += 1
        places = (f"run_dir={tmp_path / str(runs)}", f"cache_dir={tmp_path / 'cache'}")
        folder = federated.run(compose([*SMALL, *TASKS, *overrides, *places]))
        return json.loads((folder / "results.json").read_text())

    return run


def timeless(results: dict) -> object:
    """What a run says about the method: nothing that a clock or the system measured."""
    final = {k: v for k, v in results["final"].items() if k not in MEASURED}
    steps = [{k: v for k, v in step.items() if k not in MEASURED} for step in results["steps"]]
    return final, steps, results["accuracy_by_mission"], results["method"]


MEASURED = ("seconds", "node_seconds", "peak_bytes")


@pytest.mark.parametrize("name", NAMES)
def test_the_job_gives_the_same_numbers_twice(job, name):
    one, two = job(*small(name)), job(*small(name))
    validate(one)
    assert timeless(one) == timeless(two)
    assert one["method"]["leaves"] and one["final"]["bytes"]["down"] > 0
    assert [step["classes"] for step in one["steps"]] == [5, 10]
    assert all(0 <= value <= 1 for value in one["final"]["accuracy"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ("fedavg", "fedproto", "fedcof") if n in NAMES])
def test_ray_gives_the_numbers_of_the_local_engine(job, name):
    part = ("strategy.participation=0.5", "scenario.nodes=4") if name in TRAINING else ()
    local = job(*small(name), *part)
    ray = job(*small(name), *part, "engine=ray")
    assert timeless(ray) == timeless(local)


# In any Flower app


@pytest.mark.parametrize("name", NAMES)
def test_flowers_own_loop_and_a_client_app_of_somebody_else_will_do(tmp_path, name):
    somebodys = ClientApp()

    @somebodys.train()
    def learn(message: Message, context: Context) -> Message:
        return Message(answer("reconnoitre", message.content, context), reply_to=message)

    @somebodys.train("local")
    def train(message: Message, context: Context) -> Message:
        return Message(answer("train", message.content, context), reply_to=message)

    ours, theirs = world_of(tmp_path, name), world_of(tmp_path, name, client_app=somebodys)
    ours.play()
    rounds = theirs.field.plan.rounds * theirs.strategy.rounds_per_mission
    result = theirs.strategy.start(theirs.grid, theirs.arrays, num_rounds=rounds)
    assert state_digest(result.arrays) == state(ours)


# Nodes that do not do as they should

CODE = 7


def _each(content: RecordDict, change) -> RecordDict:
    """A reply with every array changed."""
    changed = RecordDict(dict(content))
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            changed[key] = ArrayRecord({name: change(array) for name, array in record.items()})
    return changed


def _status(content: RecordDict, **entries) -> RecordDict:
    return RecordDict({**content, "status": ConfigRecord({**content["status"], **entries})})


def _not_finite(array: Array) -> Array:
    values = array.numpy()
    return Array(np.full_like(values, np.nan)) if values.dtype.kind == "f" else array


def _raw(array: Array, data: bytes, **changes) -> Array:
    fields = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": data}
    return Array(**{**fields, **changes})


NOISE = np.random.default_rng(0).bytes(4096)
GARBAGE = {
    "nothing": lambda c: RecordDict(),
    "empty entries": lambda c: RecordDict({**c, "more": ConfigRecord({"text": "", "list": []})}),
    "no arrays": lambda c: RecordDict({"status": c["status"]}),
    "no status": lambda c: RecordDict({k: r for k, r in c.items() if k != "status"}),
    "random bytes": lambda c: _each(c, lambda a: _raw(a, NOISE[: len(a.data)])),
    "no bytes": lambda c: _each(c, lambda a: _raw(a, b"")),
    "cut off": lambda c: _each(c, lambda a: _raw(a, a.data[:-1])),
    "an archive": lambda c: _each(c, lambda a: _raw(a, b"PK\x03\x04" + NOISE[:200])),
    "a header that is none": lambda c: _each(
        c, lambda a: _raw(a, b"\x93NUMPY\x01\x00\x04\x00(((\n" + NOISE[:200])
    ),
    "another serialisation": lambda c: _each(c, lambda a: _raw(a, a.data, stype="pickle")),
    "far too large": lambda c: _each(
        c,
        lambda a: _raw(
            a,
            b"\x93NUMPY\x01\x00v\x00"
            + b"{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999,), }".ljust(117)
            + b"\n",
        ),
    ),
    "not finite": lambda c: _each(c, _not_finite),
    "texts as numbers": lambda c: _each(c, lambda a: Array(np.array(["x"] * 3))),
    "another shape": lambda c: _each(c, lambda a: Array(np.ones((3, 2, 1)))),
    "numbers as texts": lambda c: _status(c, **dict.fromkeys(c["status"], "?")),
    "texts as integers": lambda c: _status(c, **dict.fromkeys(c["status"], 7)),
    "nested beyond measure": lambda c: _status(
        c, **{k: "[" * 100_000 for k in c["status"] if k != "contributor"}
    ),
    "no name": lambda c: _status(c, contributor=""),
    "debts": lambda c: _status(c, **{k: -5 for k, v in c["status"].items() if type(v) is int}),
}


def played(folder, name: str, meddle, *more: str) -> Simulation:
    """Play with a node whose first reply is another one; ``meddle`` gets and gives messages."""
    world, reached = world_of(folder, name, *more), []

    def once(reply: Message) -> Message | None:
        if reply.metadata.src_node_id != 2 or reached:
            return reply
        reached.append(reply)
        return meddle(world, reply)

    world.grid.meddle = once
    world.play()
    assert reached
    return world


def never(world: Simulation, reply: Message) -> None:
    return None


def failing(world: Simulation, reply: Message) -> Message:
    sent = {message.metadata.message_id: message for message in world.grid.requests}
    request = sent[reply.metadata.reply_to_message_id]
    return Message(Error(CODE, "out of memory"), reply_to=request)


def empty(world: Simulation, reply: Message) -> Message:
    reply.content = RecordDict()
    return reply


def same(content: RecordDict, other: RecordDict) -> bool:
    return {k: _plain(r) for k, r in content.items()} == {k: _plain(r) for k, r in other.items()}


def _plain(record) -> dict:
    return {
        k: (v.data, v.dtype, v.shape, v.stype) if isinstance(v, Array) else v
        for k, v in record.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_node_that_fails_or_never_answers_or_sends_nothing_is_left_out(tmp_path, name):
    silent = played(tmp_path, name, never)
    for meddle in (failing, empty):
        world = played(tmp_path, name, meddle)
        assert state(world) == state(silent)
        assert (answers(world) == answers(silent)).all()


@pytest.mark.parametrize("name", NAMES)
def test_garbage_is_as_if_the_node_had_said_nothing(tmp_path, name):
    world = world_of(tmp_path, name)
    world.play(1)
    replies = world.grid.replies
    fresh = world_of(tmp_path, name)
    list(fresh.strategy.configure_train(1, fresh.arrays, ConfigRecord(), fresh.grid))

    def merged(*others: Message) -> str | None:
        strategy = copy.deepcopy(fresh.strategy)
        honest = [reply for reply in replies if reply.metadata.src_node_id != 2]
        list(map(record_bytes, (reply.content for reply in others)))  # as every grid is metered
        arrays, _ = strategy.aggregate_train(1, [*honest, *others])
        return None if arrays is None else state_digest(arrays)

    (theirs,) = (reply for reply in replies if reply.metadata.src_node_id == 2)
    content, silent, honest = theirs.content, merged(), merged(theirs)
    nothing_taken = fresh.strategy.leaves == "nothing"
    assert (silent == honest) == nothing_taken
    wrong = []
    for kind, spoil in GARBAGE.items():
        theirs.content = spoil(content)
        # What a message does not hold cannot be spoilt, and what nobody reads does no harm.
        harmless = kind == "empty entries" or same(theirs.content, content)
        expected = honest if harmless else silent
        try:
            if merged(theirs) != expected:
                wrong.append(f"{kind}: taken")
        except Exception as error:
            wrong.append(f"{kind}: {type(error).__name__}: {error}")
    assert not wrong


def finite(world: Simulation) -> np.ndarray:
    floats = [a.numpy().ravel() for a in world.arrays.values() if a.numpy().dtype.kind == "f"]
    return np.concatenate([np.zeros(1), *floats])


@pytest.mark.parametrize("name", NAMES)
def test_nodes_that_meet_nothing_on_a_mission_or_at_all_do_no_harm(tmp_path, name):
    uneven = ("scenario.beta=0.02", "scenario.tasks=3", "scenario.nodes=4")
    world = world_of(tmp_path, name, *uneven)
    plan = world.field.plan
    met = {(mission.node, mission.round) for mission in plan.missions}
    assert len(met) < 12, "every node meets something on every mission"
    world.play()
    assert np.isfinite(finite(world)).all()
    assert all(reply.has_content() for reply in world.grid.replies)
    classes = {str(name) for name in answers(world).ravel()}
    assert classes <= {*plan.known(3), ""}


# Names


class Numbering:
    """Lets one node number new classes the other way round."""

    def __init__(self, node: int) -> None:
        self.node, self.app, self.changed = node, ClientApp(), 0
        for kind in ("train", "train.local"):
            first, _, rest = kind.partition(".")
            getattr(self.app, first)(*[rest] if rest else [])(self.answer)

    def answer(self, message: Message, context: Context) -> Message:
        grow = FineTuning.grow

        def backwards(network: FineTuning, names) -> None:
            names = list(names)
            if getattr(network, "complete", False):  # what a constructor grows was there before
                names.reverse()
                self.changed += len(set(names) - set(network.classes)) > 1
            network.complete = True
            grow(network, names)

        if context.node_config["partition-id"] == self.node:
            FineTuning.grow = backwards
        try:
            return app(message, context)
        finally:
            FineTuning.grow = grow


@pytest.mark.parametrize("name", NAMES)
def test_a_class_is_its_name_however_a_node_numbers_it(tmp_path, name):
    numbering, long = Numbering(1), (["strategy.local.epochs=4"] if name in TRAINING else [])
    plain = world_of(tmp_path, name, *long)
    other = world_of(tmp_path, name, *long, client_app=numbering.app)
    plain.play(), other.play()
    if name in TRAINING:
        assert numbering.changed
    other.grid._app = app
    # Sums in another order differ in their last bits, which may turn an answer that was a tie.
    assert (answers(plain) == answers(other)).mean() > 0.97
    for key, array in plain.arrays.items():
        values = array.numpy()
        if values.dtype.kind == "f":
            np.testing.assert_allclose(other.arrays[key].numpy(), values, rtol=1e-3, atol=1e-5)


# Who takes part


@pytest.mark.parametrize("name", TRAINING)
def test_half_of_the_nodes_are_chosen_by_seed_round_and_name_alone(tmp_path, name):
    part = ("scenario.nodes=4", "strategy.participation=0.5", "strategy.rounds_per_mission=3")
    one = world_of(tmp_path, name, *part)
    one.play()
    two = world_of(tmp_path, name, *part)
    # Another engine gives other ids: here those of the nodes the other way round.
    contexts = two.grid._contexts
    two.grid._contexts = {5 - i: context for i, context in contexts.items()}
    two.play()
    assert chosen(one) == chosen(two)
    assert state(one) == state(two)
    assert all(len(names) == 2 for names in chosen(one))
    assert len(set(chosen(one))) > 1, "the same nodes in every round"
    introduced = [m for m in one.grid.requests if m.metadata.message_type == "query.introduce"]
    assert sorted(m.metadata.dst_node_id for m in introduced) == [1, 2, 3, 4], "asked once"


def chosen(world: Simulation) -> list[tuple[str, ...]]:
    """Names of the nodes that trained, round by round."""
    rounds: dict[int, list[str]] = {}
    asked = {m.metadata.message_id: m.content["round"]["round"] for m in world.grid.requests}
    for reply in world.grid.of("train.local"):
        number = asked[reply.metadata.reply_to_message_id]
        rounds.setdefault(number, []).append(reply.content["status"]["contributor"])
    return [tuple(sorted(rounds[number])) for number in sorted(rounds)]


# What is said about a method, and what is refused


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_leaves_a_node_and_what_its_file_is_called(tmp_path, name):
    strategy = world_of(tmp_path, name).strategy
    assert isinstance(strategy.leaves, str) and strategy.leaves == strategy.leaves.strip() != ""
    assert method_name(strategy) == name


WRONG = {
    bool: ["nonsense"],
    int: ["nonsense", -1, 2.5],
    float: ["nonsense", -1.0, math.nan],
    str: ["nonsense", 3],
    type(None): ["nonsense", -1],
    list: ["nonsense"],
    dict: ["nonsense"],
}


def settings_of(settings: dict, *above: str):
    """Yield path and value of each setting."""
    for key, value in settings.items():
        if key == "_target_":
            continue
        yield (*above, key), value
        if isinstance(value, dict):
            yield from settings_of(value, *above, key)


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_that_makes_no_sense_is_refused_before_anything_is_sent(tmp_path, name):
    world, accepted = world_of(tmp_path, name), []

    def refused(config: dict) -> bool:
        try:
            check_federated(OmegaConf.create(config))
            make_method(
                {"curriculum": None, **config}, world.encoder, briefing={}, session="s", nodes=3
            )
        except ClfedError as error:
            assert str(error).strip()
            return True
        return False

    plain = configuration(*TASKS, *small(name))
    assert not refused(plain)
    for path, value in settings_of(plain["strategy"]):
        for wrong in WRONG[type(value)]:
            config = configuration(*TASKS, *small(name))
            at = config["strategy"]
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = wrong
            try:
                if not refused(config):
                    accepted.append((".".join(path), wrong))
            except Exception as error:
                accepted.append((".".join(path), wrong, f"{type(error).__name__}: {error}"))
    assert not accepted
