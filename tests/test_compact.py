"""Dead units go, the outputs stay, and the report says what stays and why."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sparsity as ks


def randomize(model, seed=0):
    """Random weights, biases and statistics too."""
    generator = np.random.default_rng(seed)  # or a generator, as it is
    for weight in model.weights:
        values = generator.normal(size=weight.shape)
        weight.assign(abs(values) + 0.5 if "variance" in weight.name else values)
    return model


def zero(layer, incoming=(), outgoing=(), bias=None):
    """Zeros in the kernel of a layer, for units that it makes and that it takes."""
    kernel = np.array(layer.kernel)
    kernel[..., list(incoming)] = 0
    kernel[..., list(outgoing), :] = 0
    layer.kernel.assign(kernel)
    if bias is not None:
        values = np.array(layer.bias)
        values[list(incoming)] = bias
        layer.bias.assign(values)


def outputs_of(model, x):
    return [ops.convert_to_numpy(y) for y in keras.tree.flatten(model(x))]


def check(model):
    """`compact(model)`: of the same outputs, never larger, and complete."""
    small = ks.compact(model)
    generator = np.random.default_rng(1)
    x = generator.normal(size=(3, *model.inputs[0].shape[1:])).astype("float32")
    expected, outputs = outputs_of(model, x), outputs_of(small, x)
    for y, same in zip(expected, outputs, strict=True):
        np.testing.assert_allclose(same, y, rtol=1e-5, atol=1e-5 * abs(y).max())
    assert small.count_params() <= model.count_params()
    assert ks.compact(small).count_params() == small.count_params()
    assert all(row.reason for row in ks.report(small).dead_units)
    assert [layer.name for layer in small.layers] == [v.name for v in model.layers]
    return small


def sizes(model):
    """How many units each layer with a kernel puts out."""
    return {v.name: v.output.shape[-1] for v in model.layers if hasattr(v, "kernel")}


def reasons(model):
    return {row.layer: (row.dead, row.reason) for row in ks.report(model).dead_units}


def image_model(*hidden, size=3):
    """Conv2D `first` of 4 filters, `hidden`, and Conv2D `last`."""
    first = layers.Conv2D(4, 3, name="first")
    stack = [
        keras.Input((6, 6, 2)),
        first,
        *hidden,
        layers.Conv2D(3, size, name="last"),
    ]
    return randomize(keras.Sequential(stack))


def random_model(generator):
    """A graph of random layers, in which random weights are zero."""
    inputs = keras.Input((4, 4, 3))
    tensors = [inputs]

    def tensor():
        return tensors[generator.integers(len(tensors))]

    def conv(filters):
        layer = layers.Conv2D(
            filters,
            int(generator.choice([1, 3])),
            padding="same",
            activation=str(generator.choice(["relu", "linear", "sigmoid"])),
            use_bias=bool(generator.integers(2)),
        )
        return layer(tensor())

    makers = [
        lambda: conv(int(generator.integers(1, 6))),
        lambda: layers.Add()([conv(4), conv(4)]),
        lambda: layers.Concatenate()([tensor(), conv(3)]),
        lambda: layers.BatchNormalization()(tensor()),
        lambda: layers.ReLU()(tensor()),
        lambda: layers.PReLU(shared_axes=[1, 2])(tensor()),
        lambda: layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(tensor()),
        lambda: layers.MaxPooling2D(2, strides=1, padding="same")(tensor()),
        lambda: layers.LayerNormalization()(tensor()),
    ]
    for maker in generator.choice(makers, size=9):
        tensors.append(maker())
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(t) for t in tensors[-3:]])
    x = layers.Concatenate()([x, layers.Flatten()(tensor())])
    x = layers.Dense(5, activation="tanh")(x)
    model = randomize(keras.Model(inputs, layers.Dense(2)(x)), generator)
    for weight in model.weights:
        if weight.name in ("kernel", "gamma", "bias"):
            values = np.array(weight.numpy())
            for axis in range(max(values.ndim - 2, 0), values.ndim):
                shape = np.ones(values.ndim, int)
                shape[axis] = values.shape[axis]
                values *= generator.random(shape) < 0.6
            weight.assign(values)
    return model


@pytest.fixture
def dense():
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(4, activation="relu", name="a"),
            layers.Dense(4, activation="tanh", name="b"),
            layers.Dense(3, activation="softmax", name="c"),
        ]
    )
    return randomize(model)


def test_units_without_outgoing_weights_go(dense):
    zero(dense.get_layer("b"), outgoing=[1, 3])
    assert reasons(dense) == {"a": (2, None)}
    assert sizes(check(dense)) == {"a": 2, "b": 4, "c": 3}


@pytest.mark.parametrize("bias", [0.7, -0.7])
def test_constant_units_are_folded_into_the_next_bias(dense, bias):
    zero(dense.get_layer("a"), incoming=[0, 2], bias=bias)
    small = check(dense)
    assert sizes(small) == {"a": 2, "b": 4, "c": 3}
    (kernel, before), (_, after) = (
        m.get_layer("b").get_weights() for m in (dense, small)
    )
    added = max(bias, 0) * (kernel[0] + kernel[2])
    np.testing.assert_allclose(after, before + added, rtol=1e-5, atol=1e-6)


def test_what_dies_takes_others_with_it(dense):
    zero(dense.get_layer("b"), incoming=[1])  # then constant
    zero(dense.get_layer("a"), incoming=[3])
    kernel = np.array(dense.get_layer("b").kernel)
    kernel[:3, 0] = 0  # b0 takes a3 only, which is constant
    kernel[2, 2:] = 0  # a2 goes to b0 and b1 only
    dense.get_layer("b").kernel.assign(kernel)
    assert sizes(check(dense)) == {"a": 2, "b": 2, "c": 3}
    zero(dense.get_layer("c"), outgoing=[2, 3])  # and now nothing else is left
    small = check(dense)
    assert sizes(small) == {"a": 1, "b": 1, "c": 3}
    assert reasons(small)["a"] == (1, "it is the last one of a layer")


def test_a_bias_is_added_only_to_take_up_a_constant():
    a, b = (layers.Dense(n, use_bias=n == 4, name=str(n)) for n in (4, 3))
    model = randomize(keras.Sequential([keras.Input((5,)), a, b]))
    zero(b, outgoing=[0])
    small = check(model)
    assert [w.shape for w in small.layers[1].get_weights()] == [(3, 3)]
    zero(a, incoming=[1])
    small = check(model)
    assert [w.shape for w in small.layers[1].weights] == [(2, 3), (3,)]


def test_convolutions_of_every_rank():
    for rank, conv in enumerate((layers.Conv1D, layers.Conv2D, layers.Conv3D), 1):
        first, last = conv(3, 2, name="first", dilation_rate=2), conv(2, 2, strides=2)
        model = keras.Sequential([keras.Input((7,) * rank + (2,)), first, last])
        randomize(model)
        zero(first, incoming=[0])
        zero(last, outgoing=[2])
        assert check(model).get_layer("first").filters == 1


def test_only_a_zero_passes_a_padded_convolution():
    for padding, last in (("same", layers.Conv2D), ("causal", layers.Conv1D)):
        shape = (5, 5, 2)[-last(1, 1).rank - 1 :]
        first = last(4, 1, activation="relu", name="first")
        last = last(2, 3, padding=padding, name="last")
        model = randomize(keras.Sequential([keras.Input(shape), first, last]))
        zero(first, incoming=[0], bias=-1.0)
        assert check(model).get_layer("first").filters == 3
        zero(first, incoming=[1], bias=1.0)
        small = check(model)
        assert small.get_layer("first").filters == 3
        reason = "it is constant, not 0, and 'last' pads with zeros"
        assert reasons(small) == {"first": (1, reason)}
        assert reason in str(ks.report(small))


def test_a_convolution_of_size_one_pads_nothing():
    model = image_model(size=1)
    last = layers.Conv2D(2, 1, padding="same", strides=2)
    model = keras.Sequential([keras.Input((4, 4, 2)), layers.Conv2D(3, 1), last])
    zero(randomize(model).layers[0], incoming=[0, 1])
    assert model.layers[0].filters - check(model).layers[0].filters == 2


@pytest.mark.parametrize(
    "between",
    [
        lambda: [layers.BatchNormalization(), layers.ReLU()],
        lambda: [layers.PReLU(shared_axes=[1, 2]), layers.Dropout(0.5)],
        lambda: [layers.LeakyReLU(), layers.ReLU(max_value=0.5)],
        lambda: [layers.Activation("gelu"), layers.MaxPooling2D(2, padding="same")],
        lambda: [layers.ELU(), layers.AveragePooling2D(3, 1, padding="same")],
        lambda: [layers.BatchNormalization(scale=False), layers.Identity()],
        lambda: [layers.GlobalAveragePooling2D(keepdims=True)],
        lambda: [
            layers.GlobalMaxPooling2D(keepdims=True),
            layers.SpatialDropout2D(0.5),
        ],
    ],
)
def test_layers_that_work_unit_by_unit(between):
    model = image_model(*between(), size=1)
    zero(model.get_layer("first"), incoming=[0], bias=0.8)
    zero(model.get_layer("first"), incoming=[1], bias=-0.8)
    zero(model.get_layer("last"), outgoing=[3])
    small = check(model)
    assert sizes(small) == {"first": 1, "last": 3}
    for layer in small.layers[1:-1]:
        assert all(weight.shape[-1] == 1 for weight in layer.weights)


def test_a_slope_for_each_position():
    model = image_model(layers.PReLU(), size=1)
    model.layers[1].alpha.assign(np.random.default_rng(0).uniform(size=(4, 4, 4)))
    zero(model.layers[0], incoming=[0], bias=1.0)  # is not touched by the slopes
    zero(model.layers[0], incoming=[1], bias=-1.0)  # becomes an image
    small = check(model)
    assert sizes(small) == {"first": 3, "last": 3}
    reason = f"it is constant, but what '{model.layers[1].name}' makes of it is not"
    assert reasons(small) == {"first": (1, reason)}


@pytest.mark.parametrize(
    "padded",
    [
        layers.ZeroPadding2D(name="it"),
        layers.DepthwiseConv2D(3, padding="same", name="it"),
    ],
)
def test_zeros_around_an_image(padded):
    model = image_model(padded)
    zero(model.layers[0], incoming=[0], bias=0.0)
    zero(model.layers[0], incoming=[1], bias=1.0)
    small = check(model)
    assert small.get_layer("first").filters == 3
    reason = "it is constant, not 0, and 'it' pads with zeros"
    assert reasons(small) == {"first": (1, reason)}


def test_batch_normalization_that_scales_with_zero():
    model = image_model(layers.BatchNormalization(), layers.ReLU(), size=3)
    model.layers[1].gamma.assign([0, 1, 0, 1])
    assert sizes(check(model)) == {"first": 2, "last": 3}


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_flatten(data_format):
    first = data_format == "channels_first"
    inputs = keras.Input((2, 3, 4) if first else (3, 4, 2))
    conv = layers.Conv2D(3, (2, 1), data_format=data_format)
    dense = layers.Dense(4, name="dense")
    x = layers.MaxPooling2D((1, 2), data_format=data_format)(conv(inputs))
    model = keras.Model(inputs, dense(layers.Flatten(data_format=data_format)(x)))
    randomize(model)
    zero(conv, incoming=[0], bias=1.0)
    zero(dense, outgoing=[2, 5, 8, 11])  # the last of the three channels: 2 x 2 each
    zero(dense, outgoing=[1])  # one position of another one only
    assert check(model).get_layer("dense").kernel.shape == (4, 4)


def test_depthwise_filters_go_with_their_channel():
    deep = layers.DepthwiseConv2D(2, depth_multiplier=2, activation="relu", name="deep")
    model = image_model(deep)
    zero(model.layers[0], incoming=[0])
    kernel = np.array(deep.kernel)
    kernel[:, :, 1] = 0  # both filters of a channel, and one of another
    kernel[:, :, 2, 1] = 0
    deep.kernel.assign(kernel)
    small = check(model)
    assert sizes(small) == {"first": 2, "deep": 4, "last": 3}
    reason = "it shares its place with a unit that 'last' uses"
    assert reasons(small) == {"deep": (1, reason)}


def test_concatenate():
    inputs = keras.Input((3,))
    a, b, out = (layers.Dense(n, name=f"{n}") for n in (4, 5, 2))
    model = keras.Model(
        inputs, out(layers.Concatenate()([a(inputs), inputs, b(inputs)]))
    )
    randomize(model)
    zero(a, incoming=[1])
    zero(out, outgoing=[0, 4, 5, 11])  # one of a, two inputs, the last of b
    small = check(model)
    assert sizes(small) == {"4": 2, "5": 4, "2": 2}
    assert small.get_layer("2").kernel.shape == (9, 2)


@pytest.mark.parametrize("merge", [layers.Add, layers.Average])
def test_branches_that_are_added_up(merge):
    inputs = keras.Input((3,))
    a, b = layers.Dense(4, name="a"), layers.Dense(4, name="b")
    out, other = layers.Dense(2, name="c"), layers.Dense(2, name="d")
    x = a(inputs)
    model = keras.Model(inputs, [out(merge()([x, b(inputs)])), other(x)])
    randomize(model)
    zero(a, incoming=[0, 1])
    zero(b, incoming=[0, 2])
    zero(out, outgoing=[3])
    small = check(model)  # 0 is constant in both; 3 is used by another layer
    assert sizes(small) == {"a": 3, "b": 3, "c": 2, "d": 2}
    tied = "it shares its place with a unit that '{}' uses".format
    assert reasons(small)["a"] == (1, tied("c"))
    assert sum(row.dead for row in ks.report(small).dead_units if row.layer == "b") == 2
    zero(other, outgoing=[3])
    assert sizes(check(model)) == {"a": 2, "b": 2, "c": 2, "d": 2}


@pytest.mark.parametrize("seed", range(4))
def test_random_graphs(seed):
    check(random_model(np.random.default_rng(seed)))


@keras.saving.register_keras_serializable("test_compact")
class Mine(layers.Dense):
    """What a derived layer does, nobody knows."""


@pytest.mark.parametrize(
    "barrier",
    [
        lambda x: layers.LayerNormalization(name="it")(x),
        lambda x: layers.Softmax(name="it")(x),
        lambda x: layers.Activation("softmax", name="it")(x),
        lambda x: layers.BatchNormalization(name="it")(x, training=True),
        lambda x: Mine(4, name="it")(x),
        lambda x: layers.Reshape((2, 2), name="it")(x),
    ],
)
def test_barriers(barrier):
    inputs = keras.Input((3,))
    a, b, out = (layers.Dense(4, name=name) for name in ("a", "b", "out"))
    y = barrier(b(a(inputs)))
    model = keras.Model(inputs, out(y))
    randomize(model)
    for layer in (a, b):
        zero(layer, incoming=[0])
    small = check(model)
    assert [small.get_layer(name).units for name in "ab"] == [3, 4]
    dead, reason = reasons(small)["b"]
    assert dead == 1
    assert reason.startswith("it goes into 'it', which ")


def test_a_softmax_inside_a_layer_holds_its_own_units_only():
    a, b = layers.Dense(4, name="a"), layers.Dense(4, activation="softmax", name="b")
    model = keras.Sequential([keras.Input((3,)), a, b, layers.Dense(2, name="c")])
    randomize(model)
    zero(a, incoming=[0])
    zero(model.layers[2], outgoing=[1])
    small = check(model)
    assert sizes(small) == {"a": 3, "b": 4, "c": 2}
    assert not reasons(small)  # it is what the others are divided by


@keras.saving.register_keras_serializable("test_compact")
def over_width(x):
    return ops.softmax(x, axis=2)


@pytest.mark.parametrize(
    "activation", [lambda: over_width, lambda: layers.Softmax(axis=[1, 2])]
)
def test_an_activation_that_needs_the_whole_image(activation):
    conv = layers.Conv2D(4, 1, activation=activation(), name="it")
    model = image_model(conv)
    for layer in model.layers[:2]:
        zero(layer, incoming=[0])
    assert sizes(check(model)) == {"first": 3, "it": 4, "last": 3}


def test_an_activation_that_has_weights():
    it = layers.Conv2D(4, 1, activation=layers.PReLU(shared_axes=[1, 2]), name="it")
    model = image_model(it)
    model(np.ones((1, 6, 6, 2)))  # makes them
    randomize(model)
    zero(model.layers[0], incoming=[0])
    small = check(model)
    assert sizes(small) == {"first": 4, "it": 4, "last": 3}
    reason = "it goes into 'it', which has weights of another kind"
    assert reasons(small) == {"first": (1, reason)}


def test_concatenation_along_a_size_that_is_not_known():
    inputs = keras.Input((None, 4))
    a, out = layers.Dense(4, name="a"), layers.Dense(2, name="out")
    both = layers.Concatenate(axis=1, name="both")([inputs, inputs])
    model = randomize(keras.Model(inputs, out(a(both))))
    zero(a, incoming=[0])
    small = ks.compact(model)
    assert sizes(small) == {"a": 3, "out": 2}
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    np.testing.assert_allclose(*outputs_of(model, x), *outputs_of(small, x), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_a_python_lambda():
    model = image_model(layers.Lambda(lambda x: 2 * x))
    zero(model.layers[-1], outgoing=[0])
    zero(model.layers[0], incoming=[0])
    assert sizes(check(model)) == {"first": 4, "last": 3}


def test_initializers_of_the_full_size():
    values = np.arange(1.0, 5.0)
    a = layers.Dense(4, bias_initializer=keras.initializers.Constant(values), name="a")
    norm = layers.BatchNormalization(
        beta_initializer=keras.initializers.Constant([*values])
    )
    b = layers.Dense(2, bias_initializer=keras.initializers.Constant(0.5), name="b")
    model = randomize(keras.Sequential([keras.Input((5,)), a, norm, b]))
    zero(a, incoming=[0])
    small = check(model)
    assert sizes(small) == {"a": 3, "b": 2}
    again = keras.models.clone_model(small)  # builds with the initializers
    assert again.count_params() == small.count_params()
    assert again.get_layer("b").bias.numpy().tolist() == [0.5, 0.5]


@keras.saving.register_keras_serializable("test_compact")
class OfOneSize(keras.initializers.Initializer):
    def __call__(self, shape, dtype=None):
        return ops.ones(4, dtype)


def test_a_layer_that_cannot_be_smaller_is_named(dense):
    a = layers.Dense(4, bias_initializer=OfOneSize(), name="a")
    model = randomize(keras.Sequential([keras.Input((5,)), a, layers.Dense(2)]))
    zero(a, incoming=[0])
    with pytest.raises(ValueError, match="Layer 'a' could not be built anew: "):
        ks.compact(model)


def test_a_layer_that_is_called_twice_stays():
    inputs = keras.Input((4,))
    a, twice, out = (layers.Dense(4, name=name) for name in ("a", "twice", "out"))
    model = randomize(keras.Model(inputs, out(twice(twice(a(inputs))))))
    for layer in (a, twice):
        zero(layer, incoming=[0])
    small = check(model)
    assert sizes(small) == {"a": 4, "twice": 4, "out": 4}
    assert reasons(small) == {
        "a": (1, "it goes into 'twice', which is called more than once"),
        "twice": (1, "its layer is called more than once"),
    }
    assert small.get_layer("twice") in small.layers


def test_models_in_the_model_and_saved_files(tmp_path):
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="a")], name="in")
    inner.add(layers.Dense(3, name="b", dtype="float16"))
    inputs = keras.Input((4,), name="x")
    outputs = {"y": layers.Dense(2)(inner(layers.Dense(4, name="o")(inputs)))}
    model = randomize(keras.Model({"x": inputs}, outputs))
    model.compile("sgd", "mse")
    for layer in (*inner.layers, model.get_layer("o")):
        zero(layer, incoming=[0])
    inner.trainable = False
    small = ks.compact(model)
    assert [layer.units for layer in small.get_layer("in").layers] == [3, 3]
    assert small.get_layer("o").units == 4
    assert small.get_layer("in").layers[1].kernel.dtype == "float16"
    assert not small.compiled
    assert [w.path for w in small.trainable_weights] == [
        w.path for w in model.trainable_weights
    ]
    x = {"x": np.ones((2, 4))}
    small.save(tmp_path / "small.keras")
    for same in (small, keras.saving.load_model(tmp_path / "small.keras")):
        (expected,), (outputs,) = outputs_of(model, x), outputs_of(same, x)
        np.testing.assert_allclose(outputs, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "layer",
    [
        lambda **kwargs: layers.Activation("relu", **kwargs),
        lambda **kwargs: layers.Flatten(**kwargs),
        lambda **kwargs: layers.Average(**kwargs),
    ],
)
def test_the_model_is_left_as_it_was(layer):
    inputs = keras.Input((3,))
    a = layers.Dense(4)
    x, it = a(inputs), layer(activity_regularizer="l2")
    x = it([x, x] if isinstance(it, layers.Average) else x)
    model = randomize(keras.Model(inputs, layers.Dense(2)(x)))
    zero(a, incoming=[0])
    losses = len(model.losses)
    assert ks.compact(model).layers[1].units == 3
    assert len(model.losses) == losses


@pytest.mark.parametrize("shape", [(None, 4), (1, None)])
def test_dropout_of_a_noise_shape_is_a_barrier_that_trains(shape):
    dropout = layers.Dropout(0.5, noise_shape=shape, name="it")
    stack = [layers.Dense(4, name="a"), layers.Dense(4, name="b"), dropout]
    model = keras.Sequential([keras.Input((3,)), *stack, layers.Dense(2)])
    for layer in randomize(model).layers[:2]:
        zero(layer, incoming=[0])
    small = check(model)
    assert small(np.ones((2, 3)), training=True).shape == (2, 2)
    assert reasons(small) == {"b": (1, "it goes into 'it', which has a noise shape")}


def test_what_cannot_be_made_smaller(dense):
    with pytest.raises(TypeError, match="must be a Sequential or Functional"):
        ks.compact(type("Own", (keras.Model,), {})())
    with pytest.raises(ValueError, match="must be built"):
        ks.compact(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(ValueError, match="`finalize`"):
        ks.compact(ks.sparsify(dense, functools.partial(ks.LTP, l0=1e-6)))
    with pytest.raises(ValueError, match="`finalize`"):
        ks.compact(ks.sparsify(dense, ks.HALO(1e-6, 1e-6)))
    dense.get_layer("a").kernel.assign(np.full((5, 4), np.nan))
    with pytest.raises(ValueError, match="must be free of NaN"):
        ks.compact(dense)
