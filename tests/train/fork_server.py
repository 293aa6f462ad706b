"""Starts `lineage` in a second where importing jax takes four: imports once, then forks.

A program, not a module of tests. It reads one order a line: {"arguments", "said", "environment",
"traps"} forks a process that runs it, and is answered by its number; {"wait": number} waits for its
end, and is answered by its exit code (that of `subprocess`: minus the number of a signal). What
still runs when no order can come any more is killed.
No backend of jax exists before the fork (jax warns when it forks after that, and warnings are
errors here); each process makes its own.
"""

import dataclasses
import json
import os
import signal
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import orbax.checkpoint  # noqa: F401
import tyro  # noqa: F401

from experiments import gpt, language
from lineage_jax import cli
from lineage_jax.train import tracking  # noqa: F401


def serve():
    warnings.simplefilter("error", RuntimeWarning)
    running = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            pid = order["wait"]
            answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            running.remove(pid)
        else:
            answer = os.fork()
            if answer == 0:
                return run(**order)
            running.add(answer)
        print(answer, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def run(arguments, said, environment, traps):
    """One order, in the process that was forked for it."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(environment)
    for trap, setting in traps.items():
        TRAPS[trap](setting)
    cli.main(arguments)


def slow_data(seconds):
    """Every batch takes that long to come."""
    task = gpt.GPTExperiment.task

    def with_slow_data(experiment):
        whole = task(experiment)

        def train_batch(step, rows):
            time.sleep(seconds)
            return whole.train_batch(step, rows)

        return dataclasses.replace(whole, train_batch=train_batch)

    gpt.GPTExperiment.task = with_slow_data


def failing_data(step):
    """The batch of that step cannot be read."""
    task = gpt.GPTExperiment.task

    def with_failing_data(experiment):
        whole = task(experiment)

        def train_batch(now, rows):
            if now == step:
                raise OSError(f"the batch of step {now} cannot be read")
            return whole.train_batch(now, rows)

        return dataclasses.replace(whole, train_batch=train_batch)

    gpt.GPTExperiment.task = with_failing_data


def slow_evaluation(seconds):
    """An evaluation takes that long for each batch, and says when it has begun."""
    eval_batches = language.eval_batches

    def slowly(text, rows):
        print("evaluating", flush=True)
        for batch in eval_batches(text, rows):
            time.sleep(seconds)
            yield batch

    language.eval_batches = slowly


def no_cache(_):
    """Everything is compiled anew."""
    jax.config.update("jax_enable_compilation_cache", False)


def nan_gradients(steps):
    """The loss of these steps is what it is, but one of its derivatives is not a number."""
    whole = language.loss_fn

    def loss_fn(model, *, train):
        sound = whole(model, train=train)

        def poisoned(params, extra, batch, rng):
            value, rest = sound(params, extra, batch, rng)
            now = jax.random.key_data(rng)
            keys = [jax.random.fold_in(jax.random.key(0), step) for step in steps]  # of TrainState
            ill = jnp.stack([(jax.random.key_data(key) == now).all() for key in keys]).any()
            leaf = jax.tree.leaves(params)[0].ravel()[0]
            # The derivative of a square root at nought: infinite, times nought.
            return value + 0.0 * jnp.sqrt(jnp.where(ill, 0.0 * leaf, 1.0)), rest

        return poisoned

    language.loss_fn = loss_fn


TRAPS = {
    "slow_data": slow_data,
    "failing_data": failing_data,
    "slow_evaluation": slow_evaluation,
    "no_cache": no_cache,
    "nan_gradients": nan_gradients,
}

if __name__ == "__main__":
    serve()
