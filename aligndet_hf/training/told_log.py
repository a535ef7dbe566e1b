"""The log of a `Trainer` in lines that people read, between the progress bars or without them."""

from collections.abc import Mapping
from datetime import timedelta

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState

_MEASURED = ("AP", "AP50", "AP75")


def line_of(logs: Mapping, state: TrainerState) -> str:
    """An entry of the log in words: what was measured, the loss, or how long the training took."""
    where = f"step {state.global_step}" + (f" of {state.max_steps}" if state.max_steps else "")
    if "eval_AP" in logs:
        found = {name: logs[f"eval_{name}"] for name in _MEASURED}
        numbers = ", ".join(f"{name} {100 * value:.1f}" for name, value in found.items() if value >= 0)  # COCO's -1
        seconds = logs.get("eval_runtime")
        return f"{where}: {numbers}" + (f" (measured in {seconds:.0f} s)" if seconds else "")
    if "train_runtime" in logs:
        took = timedelta(seconds=round(logs["train_runtime"]))
        return f"{where}: trained for {took}, {logs['train_samples_per_second']:.3g} images a second"
    words = {"loss": "loss", "learning_rate": "learning rate", "grad_norm": "gradient"}
    told = [f"{word} {logs[name]:.4g}" for name, word in words.items() if isinstance(logs.get(name), float)]
    return f"{where}: {', '.join(told)}" if told else f"{where}: {dict(logs)}"


class TellLog(PrinterCallback):
    """Prints the entries of the log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero:
            print(line_of(logs, state), flush=True)


class BarWithLog(ProgressCallback):
    """The progress bar of transformers, with the entries of the log above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line_of(logs, state))


def tell_in_words(trainer: Trainer) -> None:
    """Has a `Trainer` tell its log in words where transformers would print dictionaries; notebooks have a table."""
    for theirs, ours in ((PrinterCallback, TellLog), (ProgressCallback, BarWithLog)):
        if trainer.pop_callback(theirs):
            trainer.add_callback(ours)
