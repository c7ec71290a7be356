"""Trainings that give the same numbers on one device and on several.

Each task is a function of an engine. It returns JSON values; those of one device are the reference.
Run as a program, this file is one process of an engine: it writes the results of all tasks.

    python tasks.py torch <number of this process> <number of processes> <port> <folder> <task> ...
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 20)).astype("float32")
Y = (X @ RNG.normal(size=(20, 5))).argmax(1).astype("int32")
TASKS = {}
# On TensorFlow, tested on the replicas of one process only; and what they don't have.
COSTLY = ["clipped", "penalized", "cached", "synchronized", "swept"]
ON_JAX = ["sharded", "in_shards"]


def task(fn):
    TASKS[fn.__name__] = fn
    return fn


class OneDevice:
    """The engine that the others are compared with."""

    index, replicas, is_global = 0, 1, True

    @contextlib.contextmanager
    def alone(self):
        """One device in the block, for the process that is given True."""
        yield True


# ---------------------------------------------------------------------- models and data


def model_of(*parts, seed=5, size=20):
    """A small model whose weights are the same on each backend and engine."""
    import keras

    rng = np.random.default_rng(seed)
    model = keras.Sequential([keras.Input((size,)), *parts])
    for variable in model.trainable_variables:
        if len(variable.shape) == 2:
            variable.assign((rng.normal(size=variable.shape) * 0.3).astype("float32"))
    return model


def dense(units, activation=None, **kwargs):
    import keras

    return keras.layers.Dense(units, activation, **kwargs)


def classifier(*between, optimizer=None, regularizer=None, classes=5, **kwargs):
    import keras

    from polus.training import ClassifierTrainer

    model = model_of(dense(32, "relu"), *between, dense(classes, kernel_regularizer=regularizer))
    optimizer = keras.optimizers.Adam(0.01) if optimizer is None else optimizer
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return ClassifierTrainer(model, optimizer, loss, **kwargs)


def arrays(n=96, batch_size=16, **kwargs):
    from polus.data import from_arrays

    return from_arrays((X[:n], Y[:n]), batch_size, **kwargs)


def summary(history, *models):
    """What a run gives: each step's loss and terms, each epoch's logs, and the weights."""
    from polus.backends import backend

    weights = [np.array(backend.view(v)) for m in models for v in m.weights]
    return {
        "steps": {k: np.asarray(v, float).tolist() for k, v in history.steps.items()},
        "epochs": [{k: np.asarray(v).tolist() for k, v in e.items()} for e in history.epochs],
        "weights": [np.asarray(w, float).ravel()[:50].tolist() for w in weights],
        "sizes": [float(np.abs(w).sum()) for w in weights],
    }


# ---------------------------------------------------------------------- tasks


@task
def plain(engine):
    """Adam, metrics of two kinds, an uneven evaluation; the number of steps a call is timed."""
    import keras

    from polus.metrics import MacroF1Score

    class Slow(type(classifier())):
        def forward_without_grads(self, x, y):
            time.sleep(0.002 * engine.index)  # where Python runs: the processes differ in speed
            return x, y

    metrics = [keras.metrics.SparseCategoricalAccuracy("accuracy"), MacroF1Score(5)]
    trainer = classifier(metrics=metrics)
    slow = Slow(trainer.model, trainer.optimizer, trainer.loss, metrics=metrics)
    history = slow.train(arrays(), 3)
    return summary(history, slow.model) | {"evaluated": slow.evaluate(arrays(90, shuffle=False))}


@task
def clipped(engine):
    """A penalty on weights, gradients clipped by the norm of all, one step a call."""
    import keras

    optimizer = keras.optimizers.SGD(0.1, global_clipnorm=0.3)
    trainer = classifier(optimizer=optimizer, regularizer=keras.regularizers.L2(0.01))
    return summary(trainer.train(arrays(), 2, steps_per_execution=1), trainer.model)


@task
def uneven(engine):
    """The last batch does not divide; batches come from the host, three a call."""
    import keras

    metric = keras.metrics.SparseCategoricalAccuracy("accuracy")
    trainer = classifier(metrics=[metric])
    if engine.index and not engine.is_global:  # the weights of the first process count
        for variable in trainer.model.weights:
            variable.assign(variable + 1)
    trainer.train_step(X[:5], Y[:5])  # by hand: whole everywhere
    data = arrays(83, device_bytes=0)
    return summary(trainer.train(data, 2, steps_per_execution=3), trainer.model)


@task
def embedded(engine):
    """Gradients of rows that were looked up several times; decayed and averaged weights."""
    import keras

    from polus.data import from_arrays
    from polus.training import ClassifierTrainer

    rng = np.random.default_rng(0)
    embedding = keras.layers.Embedding(30, 8, embeddings_initializer="zeros")
    model = keras.Sequential([keras.Input((7,), dtype="int32"), embedding])
    model.add(keras.layers.GlobalAveragePooling1D())
    model.add(dense(5))
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * 0.3)
    optimizer = keras.optimizers.AdamW(
        0.01, weight_decay=0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=4
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    words = rng.integers(0, 30, size=(90, 7)).astype("int32")
    data = from_arrays((words, Y[:90]), 16)
    history = ClassifierTrainer(model, optimizer, loss).train(data, 2, steps_per_execution=2)
    return summary(history, model)


@task
def accumulated(engine):
    """An optimizer that updates at every second step."""
    import keras

    trainer = classifier(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    return summary(trainer.train(arrays(), 2, steps_per_execution=3), trainer.model)


@task
def scaled(engine):
    """A loss that is scaled for the backward pass."""
    import keras

    inner = keras.optimizers.SGD(0.1, global_clipnorm=0.3)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0)
    trainer = classifier(optimizer=optimizer)
    return summary(trainer.train(arrays(), 1, steps_per_execution=2), trainer.model)


@task
def predicted(engine):
    """Predictions and arrays that a step returns: all rows, with an uneven rest."""
    from polus.callbacks import Callback
    from polus.host import to_host

    class Keeps(Callback):
        def on_epoch_end(self, epoch):
            self.drawn = to_host(self.coordinator.run.step_arrays["drawn"])

    class Draws(type(classifier())):
        def train_step(self, x, y):
            def loss():
                return self.loss(y, self.model(x, training=True))

            return {"loss": self.minimize(loss, self.trainable_weights), "drawn": self.model(x)}

    parts, keeps = classifier(), Keeps()
    trainer = Draws(parts.model, parts.optimizer, parts.loss)
    trainer.train(arrays(), 1, [keeps])
    predictions = trainer.predict(arrays(90, shuffle=False))
    return {"predicted": predictions.tolist(), "drawn": keeps.drawn.tolist()}


@task
def gan(engine):
    """Two optimizers, and losses that are a class of Keras and a mean of one's own, mixed."""
    import keras
    from keras import ops

    from polus.training import BaseTrainer

    class Gan(BaseTrainer):
        def __init__(self, generator, critic):
            super().__init__(generator, keras.optimizers.Adam(0.01), lambda loss: loss)
            self.critic = critic
            self.critic_optimizer = keras.optimizers.SGD(0.1, global_clipnorm=0.2)

        def train_step(self, z, x):
            entropy = keras.losses.BinaryCrossentropy(from_logits=True)

            def critic_loss():
                real, fake = self.critic(x), self.critic(self.model(z))
                return entropy(ops.ones_like(real), real) + ops.mean(ops.softplus(fake))

            def generator_loss():
                return ops.mean(ops.softplus(-self.critic(self.model(z))))

            weights = self.critic.trainable_weights
            critic = self.minimize(critic_loss, weights, self.critic_optimizer)
            loss = self.minimize(generator_loss, self.model.trainable_weights)
            self.step_counter.assign_add(1)
            return {"loss": loss, "critic": critic}

    from polus.data import from_arrays

    generator = model_of(dense(16, "relu"), dense(20), size=8)
    critic = model_of(dense(16, "relu"), dense(1), seed=6)
    z = np.random.default_rng(3).normal(size=(96, 8)).astype("float32")
    history = Gan(generator, critic).train(from_arrays((z, X), 16), 2, steps_per_execution=2)
    return summary(history, generator, critic)


@task
def penalized(engine):
    """Losses minimized together, a penalty on gradients by inputs, an optimizer called by hand."""
    import keras
    from keras import ops

    from polus import core
    from polus.data import from_arrays
    from polus.training import BaseTrainer

    class Penalized(BaseTrainer):
        def __init__(self, generator, critic, other):
            super().__init__(generator, keras.optimizers.Adam(0.01), lambda loss: loss)
            self.critic, self.other = critic, other
            self.critic_optimizer = keras.optimizers.SGD(0.1)
            self.other_optimizer = keras.optimizers.SGD(0.1, global_clipnorm=0.2)

        def train_step(self, z, x):
            def losses():
                fake = self.model(z)
                _, (slope,) = core.value_and_grad(lambda x: ops.sum(self.critic(x)), [], inputs=[x])
                penalty = ops.mean(ops.square(ops.norm(slope, axis=1) - 1))
                apart = ops.mean(ops.softplus(self.critic(fake)) + ops.softplus(-self.critic(x)))
                fooled = ops.mean(ops.softplus(-self.critic(fake)))
                return {"loss": fooled, "critic": apart + 10 * penalty}

            weights = self.other.trainable_variables
            other, gradients = core.value_and_grad(
                lambda: keras.losses.MeanSquaredError()(z, self.other(x)), weights
            )
            self.other_optimizer.apply(gradients, weights)
            groups = {
                "loss": (self.model.trainable_weights, self.optimizer),
                "critic": (self.critic.trainable_weights, self.critic_optimizer),
            }
            return self.minimize_together(losses, groups) | {"other": other}

    generator = model_of(dense(16, "tanh"), dense(20), size=8)
    critic = model_of(dense(16, "tanh"), dense(1), seed=6)
    other = model_of(dense(8), seed=7)
    z = np.random.default_rng(3).normal(size=(90, 8)).astype("float32")
    trainer = Penalized(generator, critic, other)
    trainer.other_optimizer.build(other.trainable_variables)
    history = trainer.train(from_arrays((z, X[:90]), 16), 2, steps_per_execution=2)
    return summary(history, generator, critic, other)


class Columns:
    """The documents of a retrieval batch: positives close to the queries, two hard negatives."""

    positives = (X + 0.3 * RNG.normal(size=X.shape)).astype("float32")
    negatives = RNG.normal(size=(96, 2, 20)).astype("float32")
    ids = RNG.integers(0, 40, size=96).astype("int32")


def train_retrieval(**settings):
    import keras

    from polus.data import from_arrays
    from polus.ir.losses import InfoNCE
    from polus.ir.scores import cosine
    from polus.ir.training import EfficientDenseRetrievalTrainer

    class Encoder(keras.Model):
        def __init__(self):
            super().__init__()
            self.query_projection = model_of(dense(16))
            self.document_projection = model_of(dense(16), seed=6)

        def encode_query(self, inputs, training=False):
            return inputs

        def encode_document(self, inputs, training=False):
            return inputs

    model = Encoder()
    metrics = [keras.metrics.SparseCategoricalAccuracy("accuracy")]
    trainer = EfficientDenseRetrievalTrainer(
        model,
        cosine,
        2,
        optimizer=keras.optimizers.Adam(0.01),
        loss=InfoNCE(0.2),
        metrics=metrics,
        **settings,
    )
    parts = (X, Columns.positives, Columns.negatives, {"positive_ids": Columns.ids})
    n = 83
    parts = keras.tree.map_structure(lambda a: a[:n], parts)
    history = trainer.train(from_arrays(parts, 16), 2, steps_per_execution=2)
    projections = (model.query_projection, model.document_projection)
    data = from_arrays(parts, 16, shuffle=False)
    return summary(history, *projections) | {"evaluated": trainer.evaluate(data)}


@task
def retrieval(engine):
    """Negatives from the whole batch, masked by ids of other replicas; an uneven rest."""
    return train_retrieval()


@task
def cached(engine):
    """The same with the gradients of micro-batches that don't divide a replica's rows."""
    return train_retrieval(freeze_encoder=False, micro_batch_size=3)


@task
def normalized(engine):
    """Batch norm: of the whole batch in a global view, else of each replica's rows."""
    import keras

    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    trainer = classifier(keras.layers.BatchNormalization(), optimizer=optimizer)
    history = trainer.train(arrays(), 3)
    return summary(history, trainer.model) | {"evaluated": trainer.evaluate(arrays(shuffle=False))}


@task
def rows(engine):
    """How many rows of a batch of 16 a step is traced with."""
    import keras

    seen = []

    class Sees(type(classifier())):
        def forward_without_grads(self, x, y):
            seen.append(int(x.shape[0]))
            return x, y

    parts = classifier(metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")])
    trainer = Sees(parts.model, parts.optimizer, parts.loss, metrics=parts.metrics)
    trainer.train(arrays(), 1, steps_per_execution=2)
    trainer.evaluate(arrays())
    return {"rows": seen}


@task
def synchronized(engine):
    """Batch norm over the rows of all replicas, where the engine has it."""
    import keras

    one = isinstance(engine, OneDevice)
    trainer = classifier(keras.layers.BatchNormalization(synchronized=not one))
    return summary(trainer.train(arrays(), 3), trainer.model)


@task
def skipped(engine):
    """A batch that is not finite in one replica changes nothing in any."""
    import keras

    x = X.copy()
    x[70] = np.nan
    from polus.data import from_arrays

    trainer = classifier(metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")])
    data = from_arrays((x, Y), 16, shuffle=False)
    history = trainer.train(data, 2, on_nonfinite="skip", steps_per_execution=3)
    return summary(history, trainer.model)


@task
def dropped(engine):
    """Dropout: the masks of all rows of a batch, each row with another one."""
    import keras
    from keras import ops

    from polus import core
    from polus.data import from_arrays
    from polus.training import BaseTrainer

    masks = keras.Variable(np.zeros((16, 20), "float32"), trainable=False, name="masks")

    class Dropping(BaseTrainer):
        def __init__(self, model):
            super().__init__(model, keras.optimizers.SGD(0.1), lambda loss: loss)
            self.dropout, self.masks = keras.layers.Dropout(0.5, seed=7), masks

        def forward_with_grads(self, x):
            mask = self.dropout(ops.ones_like(x), training=True)
            self.masks.assign(core.gather(mask))
            return ops.mean(self.model(mask))

    trainer = Dropping(model_of(dense(1)))
    trainer.train(from_arrays(X[:32], 16), 1, steps_per_execution=1)
    seed = keras.ops.convert_to_numpy(trainer.dropout.seed_generator.state)
    rows = keras.ops.convert_to_numpy(masks)
    return {"masks": len({row.tobytes() for row in rows}), "seed": seed.tolist()}


@task
def data_kinds(engine):
    """Each example is used exactly once an epoch, whatever the dataset is."""
    import keras
    from keras import ops

    from polus.data import from_arrays
    from polus.metrics import IMetric
    from polus.training import BaseTrainer

    class Seen(IMetric):
        def __init__(self):
            super().__init__(name="seen")
            self.counts = self.add_variable((90,), "zeros")

        def _samples_from_batch(self, rows, _):
            self.counts.assign_add(ops.sum(ops.one_hot(rows, 90), axis=0))

        def _evaluate(self):
            return self.counts.value

    class Trainer(BaseTrainer):
        def forward_with_grads(self, x, rows):
            return ops.mean(self.model(x)), rows

        def metric_samples(self, _, rows):
            return rows, rows

    rows = np.arange(90, dtype="int32")
    batches = [(X[:90][i : i + 16], rows[i : i + 16]) for i in range(0, 90, 16)]

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, i):
            return batches[i]

    kinds = {
        "arrays": from_arrays((X[:90], rows), 16),
        "arrays on the host": from_arrays((X[:90], rows), 16, device_bytes=0),
        "list": batches,
        "generator": lambda: iter(batches),
        "PyDataset": Sequence(),
    }
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        kinds["tf.data"] = tf.data.Dataset.from_tensor_slices((X[:90], rows)).batch(16)
    counts = {}
    for kind, dataset in kinds.items():
        trainer = Trainer(
            model_of(dense(1)), keras.optimizers.SGD(0.01), lambda loss, rows: loss, [Seen()]
        )
        logs = trainer.train(dataset, 1, steps_per_execution=2).epochs[0]
        counts[kind] = sorted(set(np.asarray(logs["seen"]).tolist()))
    return counts


@task
def swept(engine):
    """The range test of learning rates, which ends at the same step everywhere."""
    result = classifier().lr_finder(arrays(), num_steps=20, start_lr=1e-4)
    return {"rates": result.rates.tolist(), "losses": result.losses.tolist()}


@task
def compared(engine):
    """Metrics that compare examples, and one that keeps a maximum."""
    import keras
    from keras import ops

    import polus
    from polus.training import ClassifierTrainer

    class Largest(polus.metrics.IMetric):
        def __init__(self):
            super().__init__(name="largest")
            self.value = self.add_variable((), "zeros", aggregation="mean")

        def _samples_from_batch(self, y_true, y_pred):
            largest = ops.max(polus.gather(y_pred))
            self.value.assign(ops.maximum(self.value, largest))

        def _evaluate(self):
            return self.value

    kinds = keras.metrics.PearsonCorrelation, keras.metrics.ConcordanceCorrelation
    metrics = [kind(axis=0, name=kind.__name__) for kind in kinds] + [Largest()]
    loss, model = keras.losses.MeanSquaredError(), model_of(dense(5))
    trainer = ClassifierTrainer(model, keras.optimizers.SGD(0.1), loss, metrics=metrics)
    data = [polus.from_arrays((X[:n], np.eye(5)[Y[:n]]), 16, shuffle=False) for n in (83, 90)]
    history = trainer.train(data[0], 2, steps_per_execution=2)
    return summary(history, model) | {"evaluated": trainer.evaluate(data[1])}


@task
def refused(engine):
    """What would let processes wait for each other forever, or mix up the data."""
    from polus.callbacks import TimerCallback

    messages = []
    callbacks = [TimerCallback()] if engine.index else []
    shorter = list(arrays(96 - 32 * engine.index, shuffle=False))
    given = [(arrays(seed=engine.index), 1), (arrays(), 1, callbacks), (shorter, 1)]
    for arguments in [*given, (lambda: iter(shorter), 2)]:
        try:
            classifier().train(*arguments)
        except RuntimeError as error:
            messages.append(str(error))
    for method in ("evaluate", "predict"):
        for data in (shorter, lambda: iter(shorter)):
            try:
                getattr(classifier(), method)(data)
            except RuntimeError as error:
                messages.append(str(error))
    return {"messages": messages}


@task
def other_means(engine):
    """Losses that don't divide by the number of rows: masks, ignored classes, weights, sums."""
    import keras

    import polus
    from polus.data import from_arrays
    from polus.training import ClassifierTrainer

    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 9, (48, 6)) * (np.arange(6) < rng.integers(1, 7, (48, 1)))
    labels = (tokens + np.arange(6)) % 5
    weights = rng.uniform(size=(48, 6)).astype("float32")
    entropy = keras.losses.SparseCategoricalCrossentropy
    rows = {
        "mask": (True, entropy(from_logits=True), ()),
        "ignored": (True, entropy(from_logits=True, ignore_class=1), ()),
        "weighted": (True, entropy(from_logits=True, reduction="mean_with_sample_weight"), weights),
        "ignored, no mask": (False, entropy(from_logits=True, ignore_class=1), ()),
        "sum": (False, entropy(from_logits=True, reduction="sum"), ()),
        "dice": (False, keras.losses.Dice(), ()),
    }
    found = {}
    for name, (mask, loss, given) in rows.items():
        embedding = keras.layers.Embedding(9, 8, embeddings_initializer="ones", mask_zero=mask)
        activation = "softmax" if name == "dice" else None
        head = keras.layers.Dense(5, activation, kernel_initializer=keras.initializers.Constant(0))
        model = keras.Sequential([keras.Input((6,), dtype="int32"), embedding, head])
        head.kernel.assign(np.random.default_rng(1).normal(size=(8, 5)))
        y = np.eye(5, dtype="float32")[labels] if name == "dice" else labels.astype("int32")
        data = (tokens.astype("int32"), y, *([given] if len(given) else []))
        rate = 0.05 if name != "sum" else 0.001
        metrics = [keras.metrics.CategoricalAccuracy() if name == "dice" else polus.Accuracy(5)]
        trainer = ClassifierTrainer(
            model, keras.optimizers.SGD(rate), loss, weighted_metrics=metrics
        )
        history = trainer.train(from_arrays(data, 10 if name == "mask" else 12, shuffle=False), 2)
        evaluated = trainer.evaluate(from_arrays(data, 18, shuffle=False))
        found[name] = summary(history, model) | {"evaluated": evaluated}

    class Gathers(ClassifierTrainer):
        def forward_with_grads(self, x, y):
            return polus.gather(keras.ops.convert_to_tensor(y)), polus.gather(self.model(x))

    class Own(ClassifierTrainer):
        def train_step(self, x, y):
            def loss():
                return polus.core.batch_loss(self.loss, y, self.model(x))

            return {"loss": self.minimize(loss, self.trainable_weights)}

    for kind in (Gathers, Own):
        model, loss = model_of(dense(5)), entropy(from_logits=True, reduction="sum")
        trainer = kind(model, keras.optimizers.SGD(0.01), loss)
        found[kind.__name__] = summary(trainer.train(arrays(), 1, steps_per_execution=2), model)
    return found


@task
def written(engine):
    """Files and lines of the first process only."""
    import io

    import keras
    from rich.console import Console

    from polus.callbacks import ConsoleLogCallback, SaveModelCallback

    folder = engine.folder / f"files-{engine.index}"
    folder.mkdir()
    output, logged = io.StringIO(), []
    logging.disable(logging.NOTSET)
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.levelname)
    logging.getLogger("polus").addHandler(handler)
    callbacks = [
        ConsoleLogCallback(Console(file=output)),
        SaveModelCallback("end", folder / "model.keras"),
        keras.callbacks.CSVLogger(folder / "log.csv"),
        keras.callbacks.ModelCheckpoint(folder / "keras.keras"),
    ]
    classifier().train(arrays(), 1, callbacks)
    classifier().train(arrays(), 1, dry_run=True)
    classifier().lr_finder(arrays(), num_steps=16, start_lr=1e-4, suggestion="steep")
    with contextlib.redirect_stdout(output):
        classifier().summary()
    logging.disable(logging.WARNING)
    files = sorted(path.name for path in folder.iterdir())
    return {"files": files, "lines": output.getvalue(), "logged": sorted(set(logged))}


@task
def stopped(engine):
    """One process wants to stop: all do, after the same step."""
    from polus.callbacks import Callback

    class Stop(Callback):
        def on_train_batch_end(self, epoch, step, loss):
            if engine.index == engine.replicas - 1 or engine.is_global:
                self.coordinator.trainer.early_stop = step == 3

    trainer = classifier()
    history = trainer.train(arrays(), 3, callbacks=[Stop()])
    return {"steps": len(history.steps["loss"])}


@task
def resumed(engine):
    """A signal to one process saves and ends all; then one device continues, then several again."""
    import keras

    from polus.callbacks import Callback
    from polus.checkpoint import Checkpoint
    from polus.metrics import MacroF1Score

    folder = engine.folder / "checkpoints"

    class Kill(Callback):
        def on_train_batch_end(self, epoch, step, loss):
            if (epoch, step) == (0, 3) and (engine.index == engine.replicas - 1):
                os.kill(os.getpid(), signal.SIGTERM)

    class Break(Callback):
        every_steps = None

        def on_epoch_begin(self, epoch):
            if epoch == 2:
                raise KeyboardInterrupt

    def train(*callbacks, folder=folder):
        # Counts, of which a checkpoint in the middle of an epoch has those of all replicas.
        metrics = [keras.metrics.SparseCategoricalAccuracy("accuracy"), MacroF1Score(5)]
        trainer = classifier(metrics=metrics)
        checkpoint = Checkpoint(folder, every_steps=4, every_secs=1000)
        callbacks = [checkpoint, *callbacks]
        history = trainer.train(
            arrays(), 3, callbacks=callbacks, resume=folder, steps_per_execution=2
        )
        return summary(history, trainer.model)

    def killed(folder):
        try:
            train(Kill(), folder=folder)
        except SystemExit as end:
            return {"code": end.code, "saved": len(list(folder.glob("*-*")))}

    result = {"uninterrupted": train(folder=engine.folder / "others")}
    result |= killed(folder)
    if engine.can_be_alone:
        with engine.alone() as runs:
            if runs:
                with contextlib.suppress(KeyboardInterrupt):
                    train(Break())
    result["resumed"] = train()
    result["same"] = result["resumed"]
    if engine.can_be_alone:  # else it was resumed on the same number of devices
        killed(engine.folder / "same")
        result["same"] = train(folder=engine.folder / "same")
    return result


@task
def sharded(engine):
    """Weights that are split over the processes: trained, saved whole, refused where they can't be.

    The last task of its processes, whose distribution it changes.
    """
    import keras

    from polus.callbacks import SaveModelCallback

    mesh = keras.distribution.DeviceMesh((2,), ("batch",))
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*dense.*kernel"] = ("batch", None)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    )
    engine.folder = engine.folder / "sharded"
    message = ""
    try:
        classifier().train(arrays(), 1, [SaveModelCallback("end", engine.folder / "model.keras")])
    except NotImplementedError as error:
        message = str(error)
    kernel = classifier().model.trainable_weights[0].value
    parts = [shard.data.shape for shard in kernel.addressable_shards]
    result = resumed(engine)
    (newest, *_) = sorted(engine.folder.glob("checkpoints/*"), reverse=True)
    files = sorted(path.name for path in newest.iterdir())
    return result | {"message": message, "parts": parts, "files": files}


def layout_of(axes):
    """Kernels, and so the optimizer's slots, are split over the two devices along these axes."""
    import keras

    mesh = keras.distribution.DeviceMesh((2,), ("batch",))
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*dense.*kernel"] = axes
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


LAYOUTS = {"same": ("batch", None), "other axis": (None, "batch"), "damaged": ("batch", None)}


@task
def in_shards(engine):
    """Each process saves its own part of the weights, and reads what it needs.

    It changes the distribution of its processes.
    """
    import keras

    from polus import training_state
    from polus.backends import backend
    from polus.callbacks import Callback
    from polus.checkpoint import Checkpoint, CheckpointError, shards

    folder = engine.folder / "in_shards"
    read, seen = shards.read_shards, []
    write, tried = shards.write_shards, []

    class Break(Callback):
        every_steps = None

        def on_epoch_begin(self, epoch):
            if epoch == 2:
                raise KeyboardInterrupt

    def noted(path, expected, names=None):
        seen.append([path.name, names and list(names)])
        return read(path, expected, names)

    def first_refused(path, arrays):
        tried.append(path)
        if len(tried) == 1 and engine.index == 1:
            raise OSError("no space left for this process")
        return write(path, arrays)

    def train(name, *callbacks, axes=("batch", None)):
        keras.distribution.set_distribution(layout_of(axes))
        trainer = classifier(classes=6)  # which divides by two, unlike 5
        checkpoint = Checkpoint(folder / name, every_steps=4, keep=9)
        callbacks = [checkpoint, *callbacks]
        history = trainer.train(arrays(), 3, callbacks, resume=folder / name, steps_per_execution=2)
        return summary(history, trainer.model)

    def files(name):
        return [path.name for path in sorted((folder / name).glob("*/*"))]

    before, training_state.SHARD_BYTES = training_state.SHARD_BYTES, 0
    try:
        result = {"uninterrupted": train("whole"), "read": {}, "folder": str(folder / "alone")}
        with contextlib.suppress(KeyboardInterrupt):
            train("broken", Break())
        backend.placement().largest([0.0])  # the processes wait for each other
        result["files"] = files("broken")
        if engine.index == 0:
            for name in [*LAYOUTS, "alone", "full"]:
                shutil.copytree(folder / "broken", folder / name)
            damaged = folder / "damaged" / "checkpoint-00000004" / "shard-00001.safetensors"
            content = bytearray(damaged.read_bytes())
            content[-1] ^= 1
            damaged.write_bytes(content)
        backend.placement().largest([0.0])  # the processes wait for each other
        for name, axes in LAYOUTS.items():
            seen.clear()
            shards.read_shards = noted
            result[name] = train(name, axes=axes)
            result["read"] |= {name: list(seen)}
            shards.read_shards = read
        result["set aside"] = [path.name for path in (folder / "damaged").glob("damaged-*")]
        shards.write_shards = first_refused
        result["full"] = train("full")
        del tried[:]
        with contextlib.suppress(KeyboardInterrupt):
            train("full")  # at once: the others have waited for the first one to complete it
        try:
            classifier().train(arrays(), 1, [Checkpoint(folder / f"own-{engine.index}")])
        except CheckpointError as error:
            result["elsewhere"] = str(error)
        result["left"] = [path.name for path in (folder / "full").glob(".tmp-*")]
    finally:
        training_state.SHARD_BYTES = before
        shards.write_shards = write
    return result


@task
def lost(engine):
    """A process that ends ends the others. The last task: nobody goes on after it."""
    trainer = classifier()
    if engine.index:
        return {}
    try:
        trainer.train(arrays(), 3)
    except Exception as error:  # each engine has a class of its own
        return {"notes": error.__notes__}


# ---------------------------------------------------------------------- engines


class TorchProcesses:
    """Two processes, as `torchrun` starts them."""

    is_global, can_be_alone = False, True

    def __init__(self, index, count, port, folder):
        import torch

        torch.set_num_threads(1)
        self.index, self.replicas, self.folder = index, count, folder
        os.environ |= {"RANK": str(index), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        self._groups = 0
        self._begin()

    def _begin(self):
        import datetime

        import torch

        from polus.backends import torch_distribution

        torch_distribution.BUCKET_BYTES = 200  # many of them, also of these small models
        self._groups += 1
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{self.folder}/group{self._groups}",
            rank=self.index,
            world_size=self.replicas,
            timeout=datetime.timedelta(seconds=60),
        )

    @contextlib.contextmanager
    def alone(self):
        import torch

        torch.distributed.destroy_process_group()
        size = os.environ.pop("WORLD_SIZE")
        try:
            yield self.index == 0
        finally:
            os.environ["WORLD_SIZE"] = size
            self._begin()


class TorchSharded(TorchProcesses):
    """Two processes, over which the weights are split as `DTensor`s. It requires Keras 3.16."""

    is_global, can_be_alone = True, False

    def _begin(self):
        import keras

        keras.distribution.initialize()
        keras.distribution.set_distribution(layout_of(("batch", None)))


class JaxProcesses:
    """Two processes with a device each."""

    is_global, can_be_alone = True, False

    def __init__(self, index, count, port, folder):
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        import keras

        keras.distribution.initialize(f"localhost:{port}", count, index)
        keras.distribution.set_distribution(keras.distribution.DataParallel())
        self.index, self.replicas, self.folder = index, count, folder


class Mirrored:
    """One process with two replicas, on two devices made of one processor."""

    is_global, can_be_alone, index, replicas = False, True, 0, 1

    def __init__(self, index, count, port, folder):
        import tensorflow as tf

        self.folder = folder
        tf.config.threading.set_intra_op_parallelism_threads(1)
        (cpu,) = tf.config.list_physical_devices("CPU")
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        self.strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        self._enter()

    def _enter(self):
        self._scope = contextlib.ExitStack()
        self._scope.enter_context(self.strategy.scope())

    @contextlib.contextmanager
    def alone(self):
        self._scope.close()
        try:
            yield self.index == 0
        finally:
            self._enter()


class Workers(Mirrored):
    """Two processes with a replica each."""

    def __init__(self, index, count, port, folder):
        workers = [f"localhost:{int(port) + i}" for i in range(count)]
        task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        os.environ["TF_CONFIG"] = json.dumps(task)
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        self.index, self.replicas, self.folder = index, count, folder
        ring = tf.distribute.experimental.CommunicationImplementation.RING
        options = tf.distribute.experimental.CommunicationOptions(implementation=ring)
        self.strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
        self._enter()


ENGINES = {
    "torch": TorchProcesses,
    "torch sharded": TorchSharded,
    "jax": JaxProcesses,
    "mirrored": Mirrored,
    "tensorflow": Workers,
}


def main(name, index, count, port, folder, *names):
    logging.disable(logging.WARNING)
    folder = Path(folder)
    engine = ENGINES[name](int(index), int(count), int(port), folder)
    results = {}
    for each in names:
        began = time.monotonic()
        try:
            results[each] = TASKS[each](engine)
        except BaseException:
            results[each] = {"error": traceback.format_exc()}
        results[each]["secs"] = time.monotonic() - began
        print(each, results[each].get("error", results[each]["secs"]), flush=True)
        (folder / f"results-{index}.json").write_text(json.dumps(results))
        if "error" in results[each]:
            os._exit(1)  # the others can't go on without this process


if __name__ == "__main__":
    main(*sys.argv[1:])
