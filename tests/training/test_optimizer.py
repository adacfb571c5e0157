"""`attach`: which gradients get the term, what counts as a step, what is refused, what is warned of."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
from outer_optimizer import Outer
from plain_loop import DECAY, Net, batches, keep_by_sorting
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.optimizer import _global_optimizer_pre_hooks

import openwork as ow

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
Adam = partial(torch.optim.Adam, lr=0.01)
X, Y = batches(1)[0]


def sparse_net(method=ow.SRSTE(decay=DECAY), **options):  # noqa: B008
    model = Net().double()
    ow.sparsify(model, "2:4", method, **options)
    return model


def latent(model):
    """The dense weights behind the masks, by name."""
    names = ("conv", "middle", "last")
    return {name: getattr(model, name).parametrizations.weight.original for name in names}


def term(weight):
    return DECAY * weight.detach().where(~keep_by_sorting(weight.detach()), 0.0)


def loss_of(model):
    return (model(X) - Y).square().mean()


def added(model, step):
    """What calling `step` added for the optimizer to the gradient of each sparse weight, and what the term is, bit for
    bit. The gradients themselves are left alone."""
    own = {name: weight.grad for name, weight in latent(model).items()}
    before = {name: gradient.clone() for name, gradient in own.items()}
    wanted = {name: before[name] + term(weight) for name, weight in latent(model).items()}
    seen = {}

    def look(optimizer, *_):
        for group in optimizer.param_groups:
            for name, weight in latent(model).items():
                if any(weight is each for each in group["params"]):
                    seen[name] = weight.grad.clone()

    hooks = [optimizer.register_step_pre_hook(look) for optimizer in record_of(model).watch.attached]
    step()
    for hook in hooks:
        hook.remove()
    assert all(weight.grad is own[name] for name, weight in latent(model).items())
    assert all(torch.equal(gradient, before[name]) for name, gradient in own.items())
    seen = before | seen
    with_term = {name for name in seen if torch.equal(seen[name], wanted[name])}
    without = {name for name in seen if torch.equal(seen[name], before[name])}
    return with_term, without


def record_of(model):
    return model.__dict__["_openwork_record"]


ALL, NONE = {"conv", "middle", "last"}, set()


@pytest.fixture
def quiet():
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def caught(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [warning for warning in found if issubclass(warning.category, UserWarning)]


# --- which gradients get the term --------------------------------------------------------------------------------

IMPLEMENTATIONS = [
    pytest.param(partial(kind, lr=0.01, **{how: chosen}), id=f"{kind.__name__}-{how}={chosen}")
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
    for how, chosen in (("foreach", False), ("foreach", True), ("fused", True))
] + [
    pytest.param(partial(kind, lr=0.01), id=kind.__name__)
    for kind in (torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.ASGD)
]


@pytest.mark.parametrize("make", IMPLEMENTATIONS)
def test_the_term_is_added_once_whatever_updates_the_weights(make):
    model = sparse_net()
    optimizer = make(model.parameters())
    ow.attach(optimizer, model)
    loss_of(model).backward()
    biases = [model.conv.bias.grad.clone(), model.last.bias.grad.clone()]
    assert added(model, optimizer.step) == (ALL, NONE)
    assert torch.equal(model.conv.bias.grad, biases[0])
    assert torch.equal(model.last.bias.grad, biases[1])


@pytest.mark.parametrize(("method", "wanted"), [(ow.STE(), NONE), (ow.ASP(), NONE), (ow.Dense(), NONE)], ids=str)
def test_methods_without_a_term_add_nothing(method, wanted):
    model = sparse_net(method)
    optimizer = SGD(model.parameters())
    handle = ow.attach(optimizer, model)
    loss_of(model).backward()
    assert added(model, optimizer.step) == (wanted, ALL)
    assert handle.steps == 1


def test_every_parameter_group_gets_the_term():
    model = sparse_net()
    first, *others = model.children()
    optimizer = SGD([{"params": first.parameters(), "lr": 0.0}, *({"params": each.parameters()} for each in others)])
    ow.attach(optimizer, model)
    loss_of(model).backward()
    assert added(model, optimizer.step) == (ALL, NONE)


def test_a_group_added_later_gets_the_term():
    model = sparse_net()
    optimizer = SGD(model.conv.parameters())
    ow.attach(optimizer, model)
    loss_of(model).backward()
    assert added(model, optimizer.step) == ({"conv"}, {"middle", "last"})
    optimizer.add_param_group({"params": list(model.middle.parameters())})
    assert added(model, optimizer.step)[1] == {"last"}
    optimizer.zero_grad()
    loss_of(model).backward()
    model.last.zero_grad(set_to_none=False)
    assert added(model, optimizer.step) == ({"conv", "middle"}, {"last"})


def test_two_optimizers_each_serve_their_own_weights():
    model = sparse_net()
    one, two = SGD(model.conv.parameters()), Adam([*model.middle.parameters(), *model.last.parameters()])
    handles = ow.attach(one, model), ow.attach(two, model)
    loss_of(model).backward()
    assert added(model, one.step) == ({"conv"}, {"middle", "last"})
    assert added(model, two.step) == ({"middle", "last"}, {"conv"})
    assert [handle.steps for handle in handles] == [1, 1]


def test_gradients_that_are_none_stay_none():
    model = sparse_net()
    optimizer = SGD(model.parameters())
    ow.attach(optimizer, model)
    model.middle.requires_grad_(False)
    loss_of(model).backward()
    optimizer.step()
    assert model.middle.parametrizations.weight.original.grad is None
    assert torch.count_nonzero(model.conv.parametrizations.weight.original.grad)


def test_weights_changed_after_the_forward_get_the_mask_they_have_now():
    model = sparse_net()
    optimizer = SGD(model.parameters())
    ow.attach(optimizer, model)
    loss_of(model).backward()
    model.load_state_dict({name: tensor.flip(-1) for name, tensor in model.state_dict().items()})
    assert added(model, optimizer.step) == (ALL, NONE)


def test_weights_exchanged_after_the_forward_get_the_mask_they_have_now():
    """Through `.data`, as SAM goes back to where it came from: torch counts no version."""
    model = sparse_net()
    optimizer = SGD(model.parameters())
    ow.attach(optimizer, model)
    loss_of(model).backward()
    for weight in latent(model).values():
        weight.data = weight.data.flip(-1)
    assert added(model, optimizer.step) == (ALL, NONE)


def test_the_mask_under_autocast_is_that_of_the_float32_weights():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():  # equal in bfloat16, where ties would keep the first two
        model[0].weight.copy_(torch.tensor([[1.0, 1.001, 1.002, 1.003]]))
    ow.sparsify(model, "2:4", ow.SRSTE(decay=DECAY))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ow.attach(optimizer, model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.tensor([[0.0, 1.0, 2.0, 4.0]]))
    assert output.item() == 6.0
    output.sum().backward()
    weight = model[0].parametrizations.weight.original
    before, seen = weight.grad.clone(), []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))
    optimizer.step()
    assert (seen[0] - before).tolist() == [[0.5, pytest.approx(0.5005), 0.0, 0.0]]
    assert torch.equal(weight.grad, before)


# --- closures ----------------------------------------------------------------------------------------------------


def test_lbfgs_adds_the_term_at_each_evaluation(row):
    model, twin = sparse_net(), sparse_net(ow.STE())
    twin.load_state_dict(model.state_dict())
    ends = []
    for each, by_hand in ((model, False), (twin, True)):
        optimizer = torch.optim.LBFGS(each.parameters(), lr=0.1, max_iter=5)
        handle = ow.attach(optimizer, each)
        evaluations = []

        def closure(each=each, by_hand=by_hand, optimizer=optimizer, evaluations=evaluations):
            evaluations.append(1)
            optimizer.zero_grad()
            loss = loss_of(each)
            loss.backward()
            for weight in latent(each).values() if by_hand else ():
                weight.grad += term(weight)
            return loss

        optimizer.step(closure)
        optimizer.step(closure)
        assert len(evaluations) == 10
        assert handle.steps == 2
        ends.append(each.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    row("Optimizer", "`LBFGS` without a line search: the term at each evaluation, against the term added by hand")


class CallsThrice(torch.optim.Optimizer):
    """Evaluates its closure three times a step, and keeps the gradients of each."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.seen = []

    def step(self, closure):
        for _ in range(3):
            closure()
            self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])


@pytest.mark.parametrize("by_keyword", [False, True])
def test_each_call_of_a_closure_adds_the_term_once(by_keyword):
    model = sparse_net()
    optimizer = CallsThrice([latent(model)["middle"]])
    handle = ow.attach(optimizer, model)
    closure = lambda: (optimizer.zero_grad(), loss_of(model).backward())  # noqa: E731
    closure()
    wanted = latent(model)["middle"].grad + term(latent(model)["middle"])
    optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert len(optimizer.seen) == 3
    assert all(torch.equal(gradient, wanted) for (gradient,) in optimizer.seen)
    assert handle.steps == 1


def test_the_closure_given_by_the_user_is_not_changed():
    model = sparse_net()
    optimizer = SGD(model.parameters())
    ow.attach(optimizer, model)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss_of(model).backward()
        return 7.0

    assert [optimizer.step(closure), optimizer.step(closure=closure)] == [7.0, 7.0]
    assert len(calls) == 2
    closure()
    alone = [weight.grad for weight in latent(model).values()]
    model.zero_grad()
    loss_of(model).backward()
    assert all(torch.equal(w.grad, g) for w, g in zip(latent(model).values(), alone, strict=True))


# --- what counts as a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [SGD, Adam, partial(torch.optim.AdamW, lr=0.01)], ids=["sgd", "adam", "adamw"])
def test_a_step_skipped_for_overflow_changes_and_counts_nothing(make, fused):
    model = sparse_net()
    optimizer = make(model.parameters(), fused=fused)
    handle = ow.attach(optimizer, model, topology=ow.Topology(every=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scales = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: scales.append(getattr(optimizer, "grad_scale", None)))
    for factor, steps in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        start = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert handle.steps == steps
        assert [record["step"] for record in handle.topology.records] == list(range(1, steps + 1))
        same = [torch.equal(start[name], tensor) for name, tensor in model.state_dict().items()]
        assert all(same) if factor > 1 else not any(same)
    assert [scale and scale.item() for scale in scales] == ([65536.0, 65536.0, 32768.0] if fused else [None, None])


@pytest.mark.parametrize("fused", [False, True])
def test_whether_a_step_was_skipped_is_asked_when_somebody_wants_to_know(fused):
    """On a GPU the answer has to be waited for. A fused optimizer skips by itself; nothing else needs the answer."""
    model = sparse_net()
    optimizer = SGD(model.parameters(), fused=fused)
    handle = ow.attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    for factor in (1.0, float("inf"), 1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert (handle._skipped is not None) is fused
    assert handle.state_dict()["steps"] == handle.steps == 3
    handle.load_state_dict({"steps": 7, "topology": None})
    assert handle.steps == 7


@pytest.mark.parametrize("make", [SGD, Adam, partial(SGD, lr=torch.tensor(0.1))], ids=["sgd", "adam", "tensor rate"])
def test_the_step_that_only_creates_state_adds_and_counts_nothing(make):
    """torch.distributed.checkpoint runs one, with learning rate 0 and zero gradients."""
    model = sparse_net()
    optimizer = make(model.parameters())
    handle = ow.attach(optimizer, model, topology=ow.Topology(every=1))
    state = get_optimizer_state_dict(model, optimizer)
    assert handle.steps == 0
    assert handle.topology.records == []
    moments = [t for values in optimizer.state.values() for t in values.values() if t.ndim]
    assert moments
    assert not any(torch.count_nonzero(moment) for moment in moments)
    loss_of(model).backward()
    optimizer.step()
    set_optimizer_state_dict(model, make(model.parameters()), state)
    assert handle.steps == 1


def test_a_checkpoint_of_torch_distributed_resumes_exactly():
    def build(seed):
        torch.manual_seed(seed)
        model = sparse_net()
        optimizer = Adam(model.parameters())
        return model, optimizer, ow.attach(optimizer, model)

    model, optimizer, _ = build(0)
    train(model, optimizer, batches(6)[:3])
    other, other_optimizer, handle = build(1)
    other.load_state_dict(model.state_dict())
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(other, other_optimizer, state)
    assert handle.steps == 0
    train(model, optimizer, batches(6)[3:])
    train(other, other_optimizer, batches(6)[3:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_warm_up_step_with_rate_zero_is_a_step(rate):
    model = sparse_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    handle = ow.attach(optimizer, model)
    loss_of(model).backward()
    wanted = {name: weight.grad + term(weight) for name, weight in latent(model).items()}
    optimizer.step()
    assert handle.steps == 1
    for name, weight in latent(model).items():
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], wanted[name])


def test_topology_is_recorded_around_the_steps():
    model = sparse_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    handle = ow.attach(optimizer, model, topology=ow.Topology(every=2))
    masks = [{name: keep_by_sorting(weight) for name, weight in latent(model).items()}]
    for batch in batches(6):
        train(model, optimizer, [batch])
        masks.append({name: keep_by_sorting(weight) for name, weight in latent(model).items()})

    def sad(a, b):
        return sum(int((masks[a][name] ^ masks[b][name]).sum()) for name in ALL)

    found = [tuple(record[f"sad_{span}"] for span in ("start", "last", "step")) for record in handle.topology.records]
    assert found == [(sad(0, step), sad(step - 2, step), sad(step - 1, step)) for step in (2, 4, 6)]
    assert all(map(all, found))


# --- resuming ----------------------------------------------------------------------------------------------------


def train(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [SGD, Adam, partial(Adam, fused=True)], ids=["sgd", "adam", "fused"])
def test_a_resumed_run_ends_as_if_it_had_not_stopped(make):
    def build(seed):
        torch.manual_seed(seed)
        model = sparse_net()
        optimizer = make(model.parameters())
        return model, optimizer, ow.attach(optimizer, model, topology=ow.Topology(every=3))

    data, saved = batches(20), io.BytesIO()
    whole = build(0)
    train(*whole[:2], data)
    first = build(0)
    train(*first[:2], data[:10])
    torch.save([each.state_dict() for each in first], saved)
    saved.seek(0)
    second = build(1)
    for each, state in zip(second, torch.load(saved, weights_only=True), strict=True):
        each.load_state_dict(state)
    train(*second[:2], data[10:])
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True))
    assert second[2].steps == 20
    assert len(whole[2].topology.records) == 6
    assert second[2].topology.records == whole[2].topology.records
    assert second[2].topology.between(0, 18) == whole[2].topology.between(0, 18)


def test_state_of_an_optimizer_built_before_sparsify_is_refused():
    model = Net().double()
    optimizer = Adam(model.parameters())
    loss_of(model).backward()
    optimizer.step()
    ow.sparsify(model, "2:4")
    after = Adam(model.parameters())
    ow.attach(after, model)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 has shape \(8, 4, 3, 3\), the parameter \(8,\)"):
        after.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "make", [torch.optim.LBFGS, torch.optim.Adafactor, SGD, Adam, torch.optim.ASGD], ids=lambda make: str(make)[-30:]
)
def test_state_of_the_same_optimizer_loads_whatever_its_shapes(make):
    model = sparse_net()
    optimizer = make(model.parameters())
    handle = ow.attach(optimizer, model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    handle.detach()
    again = make(model.parameters())
    ow.attach(again, model)
    again.load_state_dict(optimizer.state_dict())


# --- what attach refuses -----------------------------------------------------------------------------------------


def test_a_plain_model_is_refused():
    model = Net()
    with pytest.raises(
        ValueError, match=r"Net is not sparsified: call ow\.sparsify\(model, pattern\) before ow\.attach"
    ):
        ow.attach(SGD(model.parameters()), model)


def test_a_finalized_model_is_refused():
    model = sparse_net()
    ow.finalize(model)
    with pytest.raises(ValueError, match="Net is not sparsified"):
        ow.attach(SGD(model.parameters()), model)


def test_a_part_of_a_sparsified_model_is_refused():
    model = sparse_net()
    with pytest.raises(ValueError, match=r"Conv2d is only part of a sparsified model"):
        ow.attach(SGD(model.parameters()), model.conv)


@pytest.mark.parametrize("parameters", [lambda: Net().parameters(), lambda: [nn.Parameter(torch.ones(3))]])
def test_an_optimizer_of_other_weights_is_refused(parameters):
    with pytest.raises(ValueError, match=r"this SGD holds none of the sparse weights of Net; build it from"):
        ow.attach(SGD(parameters()), sparse_net())


def test_attaching_twice_is_refused():
    model = sparse_net()
    optimizer = SGD(model.parameters())
    ow.attach(optimizer, model)
    with pytest.raises(ValueError, match="this SGD is attached already: the decay would be added twice"):
        ow.attach(optimizer, model)


@pytest.mark.parametrize("thing", [None, "sgd", torch.optim.SGD])
def test_what_is_no_optimizer_is_refused(thing):
    with pytest.raises(TypeError, match=f"found {type(thing).__name__} for the optimizer; needed a torch.optim.Opt"):
        ow.attach(thing, sparse_net())


def test_a_line_search_is_refused():
    model = sparse_net()
    with pytest.raises(ValueError, match=r"LBFGS with a line search .* use line_search_fn=None"):
        ow.attach(torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe"), model)


def test_a_refused_attach_leaves_nothing_behind():
    model = sparse_net()
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    with pytest.raises(ValueError, match="line search"):
        ow.attach(optimizer, model)
    assert not optimizer._optimizer_step_pre_hooks
    optimizer.param_groups[0]["line_search_fn"] = None
    ow.attach(optimizer, model)


# --- wrappers, parts, ends ---------------------------------------------------------------------------------------


class Wrapper:
    """Like Accelerate's and Lightning's: not a torch optimizer, but it holds one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


@pytest.mark.parametrize("wrap", [Wrapper, lambda optimizer: Wrapper(Wrapper(optimizer))], ids=["one", "two"])
@pytest.mark.usefixtures("quiet")
def test_a_wrapped_optimizer_is_unwrapped(wrap):
    model = sparse_net()
    wrapped = wrap(SGD(model.parameters()))
    handle = ow.attach(wrapped, model)
    loss_of(model).backward()
    assert added(model, wrapped.step) == (ALL, NONE)
    assert handle.steps == 1


@pytest.mark.parametrize("wrap", [torch.compile, torch.optim.swa_utils.AveragedModel, nn.DataParallel])
def test_a_wrapped_model_is_unwrapped(wrap):
    model = sparse_net()
    optimizer = SGD(model.parameters())
    wrapped = wrap(model)
    if isinstance(wrapped, torch.optim.swa_utils.AveragedModel):
        optimizer = SGD(wrapped.parameters())
        model = wrapped.module
    ow.attach(optimizer, wrapped)
    loss_of(model).backward()
    assert added(model, optimizer.step) == (ALL, NONE)


def test_a_model_whose_part_was_sparsified_can_be_attached():
    model = Net().double()
    ow.sparsify(model.middle, "2:4", ow.SRSTE(decay=DECAY))
    optimizer = SGD(model.parameters())
    ow.attach(optimizer, model)
    loss_of(model).backward()
    weight, seen = model.middle.parametrizations.weight.original, []
    wanted = weight.grad + term(weight)
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))
    optimizer.step()
    assert torch.equal(seen[0], wanted)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("stepped", [False, True])
def test_after_detach_nothing_is_added_counted_or_said(stepped):
    model = sparse_net()
    optimizer = SGD(model.parameters())
    handle = ow.attach(optimizer, model)
    loss_of(model).backward()
    if stepped:
        optimizer.step()
    handle.detach()
    assert added(model, optimizer.step) == (NONE, ALL)
    assert handle.steps == stepped
    handle.detach()
    again = ow.attach(optimizer, model)
    model.zero_grad()
    loss_of(model).backward()
    assert added(model, optimizer.step) == (ALL, NONE)
    assert again.steps == 1


def test_a_finished_run_is_freed_at_once():
    """Without waiting for the garbage collector: on a GPU the memory is needed for what comes next."""
    model = sparse_net()
    optimizer = SGD(model.parameters())
    ow.attach(optimizer, model, topology=ow.Topology(every=1))
    train(model, optimizer, batches(2))
    alive = [weakref.ref(each) for each in (model, optimizer, *latent(model).values())]
    gc.collect()  # what torch's register_parametrization left behind
    gc.disable()
    try:
        del model, optimizer
        assert [each() for each in alive] == [None] * 5
    finally:
        gc.enable()


# --- warnings ----------------------------------------------------------------------------------------------------


def steps_of(optimizer, model, count=3):
    def run():
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

    return run


def test_an_optimizer_that_nobody_attached_is_told_of_once():
    model = sparse_net()
    (warning,) = caught(steps_of(SGD(model.parameters()), model))
    assert "SGD steps a model sparsified with SRSTE(decay=0.5), but nobody attached it" in str(warning.message)
    assert warning.filename == __file__
    (warning,) = caught(steps_of(Adam(model.parameters()), model))
    assert "Adam steps a model" in str(warning.message)


def test_of_two_optimizers_the_one_not_attached_is_told_of():
    model = sparse_net()
    ow.attach(SGD(model.conv.parameters()), model)
    assert len(caught(steps_of(Adam(model.middle.parameters()), model))) == 1


def test_an_optimizer_given_the_weights_later_is_told_of():
    model, other = sparse_net(), nn.Parameter(torch.ones(3))
    optimizer = SGD([other])
    assert caught(steps_of(optimizer, model)) == []
    optimizer.add_param_group({"params": list(model.parameters())})
    assert len(caught(steps_of(optimizer, model))) == 1


@pytest.mark.parametrize("method", [ow.STE(), ow.ASP(), ow.Dense()], ids=str)
@pytest.mark.usefixtures("quiet")
def test_methods_without_a_term_need_no_attach(method):
    model = sparse_net(method)
    steps_of(SGD(model.parameters()), model)()


@pytest.mark.usefixtures("quiet")
def test_nothing_is_said_where_nothing_is_wrong():
    model, dense = sparse_net(), Net().double()
    optimizer = SGD(model.parameters())
    ow.attach(optimizer, model)
    steps_of(optimizer, model)()
    steps_of(SGD(dense.parameters()), dense)()
    steps_of(SGD([model.conv.bias]), model)()
    ow.finalize(model)
    steps_of(SGD(model.parameters()), model)()


@pytest.mark.parametrize("attached", ["outer", "inner"])
@pytest.mark.usefixtures("quiet")
def test_an_optimizer_around_or_inside_the_attached_one_is_not_told_of(attached):
    model = sparse_net()
    inner = SGD(model.parameters())
    outer = Outer(inner)
    ow.attach(outer if attached == "outer" else inner, model)
    loss_of(model).backward()
    assert added(model, outer.step) == (ALL, NONE)


def test_a_finalized_model_that_is_trained_on_is_told_of_once():
    model = sparse_net()
    optimizer = SGD(model.parameters())
    handle = ow.attach(optimizer, model)
    ow.finalize(model)
    (warning,) = caught(steps_of(optimizer, model))
    assert "the model was finalized, but its optimizer still steps" in str(warning.message)
    assert warning.filename == __file__
    handle.detach()
    assert caught(steps_of(optimizer, model)) == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_are_watched_and_attached_on_their_own(duplicate):
    model = sparse_net()
    optimizer = SGD(model.parameters())
    handle = ow.attach(optimizer, model)
    steps_of(optimizer, model)()
    model_copy, optimizer_copy = duplicate((model, optimizer))
    (warning,) = caught(steps_of(optimizer_copy, model_copy))
    assert "nobody attached it" in str(warning.message)
    copied_handle = ow.attach(optimizer_copy, model_copy)
    optimizer_copy.zero_grad()
    loss_of(model_copy).backward()
    assert added(model_copy, optimizer_copy.step) == (ALL, NONE)
    assert (handle.steps, copied_handle.steps) == (3, 1)
    assert caught(steps_of(optimizer, model)) == []


def test_torch_keeps_one_hook_of_ours_whatever_is_sparsified():
    """Its hooks must not change while a step goes through them, and a model may end in the middle of one."""
    hooks = dict(_global_optimizer_pre_hooks)
    model = sparse_net()
    twin = copy.deepcopy(model)
    watched = [weakref.ref(each) for each in (record_of(model).watch, record_of(twin).watch)]
    del twin
    for _ in range(3):
        ow.finalize(model)
        ow.sparsify(model, "2:4")
    del model
    gc.collect()
    assert [each() for each in watched] == [None, None]
    assert dict(_global_optimizer_pre_hooks) == hooks
