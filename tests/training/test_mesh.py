import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from toy import Batches, ToyConfig

from lcattn.training import MeshConfig, OptimizerConfig
from lcattn.training.evaluation import device_batch
from lcattn.training.mesh import param_shardings, shard_batch
from lcattn.training.state import abstract_model, abstract_state, init_state
from lcattn.training.step import jit_train_step, make_train_step


def shape(config):
    return tuple(config.make(jax.devices()[:8]).shape.values())


def test_minus_one_takes_the_remaining_devices():
    assert shape(MeshConfig()) == (8, 1)
    assert shape(MeshConfig(fsdp=2)) == (4, 2)
    assert shape(MeshConfig(data=2, fsdp=-1)) == (2, 4)


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": -1, "fsdp": 3}, {"data": 4, "fsdp": 4}])
def test_axes_that_do_not_fit_the_devices_are_an_error(axes):
    with pytest.raises(ValueError, match=r"mesh: expected axes that multiply .*\(8\)"):
        MeshConfig(**axes).make(jax.devices()[:8])


@pytest.mark.parametrize("axes", [{"data": 0}, {"fsdp": -2}, {"data": -1, "fsdp": -1}])
def test_axes_out_of_range_are_an_error(axes):
    with pytest.raises(ValueError, match="MeshConfig"):
        MeshConfig(**axes)


def specs(mesh, **axes_and_shapes):
    params = nnx.State(
        {
            name: nnx.Param(jax.ShapeDtypeStruct(shape, "float32"), axes=axes)
            for name, (axes, shape) in axes_and_shapes.items()
        }
    )
    return {name: s.spec for name, s in param_shardings(params, mesh).items()}


def test_logical_axes_map_to_the_mesh():
    found = specs(
        MeshConfig(fsdp=4).make(jax.devices()[:8]),
        table=(("vocab", "embed"), (11, 8)),
        odd=(("embed", "mlp"), (6, 8)),  # 6 is not a multiple of 4: kept whole.
        square=(("embed", "embed"), (8, 8)),  # Split once.
        unnamed=(None, (8, 8)),
        partly=((None, "embed"), (8, 8)),
    )
    assert found == {
        "table": P(None, "fsdp"),
        "odd": P(None, None),
        "square": P("fsdp", None),
        "unnamed": P(None, None),
        "partly": P(None, "fsdp"),
    }


def test_wrong_number_of_axis_names_is_an_error():
    with pytest.raises(ValueError, match="axes of w: expected 2 names"):
        specs(MeshConfig().make(jax.devices()[:1]), w=(("embed",), (8, 8)))


def test_rows_that_do_not_divide_among_the_devices_are_an_error():
    with pytest.raises(ValueError, match=r"batch\['tokens'\]: expected a multiple of 8 rows"):
        shard_batch({"tokens": np.zeros((6, 2))}, MeshConfig().make(jax.devices()[:8]))


def loss_curve(mesh, num_steps=8):
    optimizer, schedule = OptimizerConfig(learning_rate=1e-2).make(num_steps)
    with jax.set_mesh(mesh):
        config = ToyConfig(dropout=0.1)
        model_def, params, model_state = abstract_model(config, mesh)
        target = abstract_state(params, model_state, optimizer, mesh)
        state = init_state(config, optimizer, 0, target)
        moment = state.opt_state[1][0].mu["embedding"]
        assert moment.sharding.shard_shape(moment.shape) == (11, 16 // mesh.shape["fsdp"])
        step = jit_train_step(make_train_step(model_def, optimizer, schedule), target)
        data, losses = Batches(), []
        for _ in range(num_steps):
            state, metrics = step(state, device_batch(next(data), mesh))
            losses.append(float(metrics["loss"]))
    return losses


def test_every_mesh_gives_the_loss_curve_of_one_device():
    expected = loss_curve(MeshConfig().make(jax.devices()[:1]))
    assert expected[-1] < 0.97 * expected[0]
    for axes in ({"data": 4, "fsdp": 2}, {"data": 8}, {"data": 1, "fsdp": 8}):
        losses = loss_curve(MeshConfig(**axes).make(jax.devices()[:8]))
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
