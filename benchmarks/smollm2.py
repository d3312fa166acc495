"""Adapt a real pretrained model with the real commands: SmolLM2-135M-Instruct on instructions, chats and photos.

    python -m benchmarks.smollm2 --alpaca alpaca_data.json [--seeds 0 1 2] [--out runs/smollm2]
    python -m benchmarks.smollm2 --chat alpaca_data.json
    python -m benchmarks.smollm2 --photos caltech-101

    alpaca  600 records, 100 others held out: loss before and after, and 10 held-out instructions answered by both
    chat    the same records as conversations in the model's own chat template: loss before and after
    photos  "What is in the photo?" with four options, about Caltech-101's photos in CoOp's layout, read by an ImageNet
            encoder: 600 questions to train on, 200 about other photos to answer; without an adapter, with one that sees
            no photos, with one that sees them, and with the photos shuffled among the questions

Both models come out of the package index (`tests.real_models`). Each part is `adapter-train` with
`--config smollm2`, then `adapter-generate` or `adapter-eval`, in processes of their own, as a user runs
them. A command that has ended is not run again, and one that was interrupted goes on. Beside the results stand the
minutes from command to end, CPU minutes, the peak of the process tree's memory (proportional set size), and the load of
the machine meanwhile.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from adapter.records.scienceqa import Problem
from benchmarks.digits_images import shuffle_images
from rayjobs.reporting.tables import markdown_table, mean_and_deviation
from rayjobs.storage.files import atomic_folder, read_json, read_jsonl, write_json, write_jsonl
from tests.real_models import efficientnet_lite0, smollm2

CONFIG = Path(__file__).parent.parent / "configs" / "adapter" / "smollm2.yaml"

SET_ASIDE = 200
"""Shuffled records on which the config's settings were chosen; they are in no part of this benchmark."""
TRAIN, HELD_OUT, ANSWERED = 600, 100, 10
TRAIN_QUESTIONS, TEST_QUESTIONS, OPTIONS = 600, 200, 4


class Watch(threading.Thread):
    """Samples memory and CPU time of a process and its descendants, and the machine's load, until it is stopped."""

    def __init__(self, pid: int, every_s: float = 3.0) -> None:
        super().__init__(daemon=True)
        self.root, self.every_s, self.stopped = psutil.Process(pid), every_s, threading.Event()
        self.peak_bytes, self.cpu_s, self.loads = 0, dict[int, float](), list[float]()

    def run(self) -> None:
        while not self.stopped.wait(self.every_s):
            self.loads.append(os.getloadavg()[0])
            try:
                processes = [self.root, *self.root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak_bytes = max(self.peak_bytes, sum(map(self._sample, processes)))

    def _sample(self, process: psutil.Process) -> int:
        try:
            times, memory = process.cpu_times(), process.memory_full_info()
        except psutil.Error:  # it has ended
            return 0
        self.cpu_s[process.pid] = times.user + times.system
        return int(getattr(memory, "pss", memory.uss))

    def figures(self) -> dict[str, float]:
        """Return the figures since the start."""
        self.stopped.set()
        self.join()
        return {
            "peak_gib": round(self.peak_bytes / 2**30, 2),
            "cpu_minutes": round(sum(self.cpu_s.values()) / 60, 2),
            "load": round(statistics.mean(self.loads), 1) if self.loads else 0.0,
        }


def command(job: str, out: Path, name: str, *words: str) -> dict[str, Any]:
    """Run a job as a user would, unless it has ended. Returns its result, with what the run cost under `cost`."""
    folder, cost = out / name, out / "costs" / f"{name}.json"
    if not cost.exists():
        resumed = folder.exists()
        given = [*words, f"run.name={name}", f"run.storage={out}"]
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "rayjobs", job, *given])
        watch = Watch(process.pid)
        watch.start()
        if process.wait():
            sys.exit(f"{job} {' '.join(given)} ended with {process.returncode}")
        minutes = round((time.monotonic() - start) / 60, 2)
        write_json(cost, {"minutes": minutes, **watch.figures(), "resumed": resumed})
    return {**read_json(folder / "result.json"), "cost": read_json(cost)}


def train(out: Path, name: str, *words: str) -> dict[str, Any]:
    """Train an adapter with the shipped config and further settings."""
    return command("adapter-train", out, name, "--config", str(CONFIG), f"base.path={smollm2()}", *words)


def split_records(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the records to train on, and those held out: always the same ones."""
    records = json.loads(file.read_text(encoding="utf-8"))
    random.Random(0).shuffle(records)
    wanted = records[SET_ASIDE : SET_ASIDE + TRAIN + HELD_OUT]
    if len(wanted) < TRAIN + HELD_OUT:
        sys.exit(f"{file}: {len(records)} records, but {SET_ASIDE + TRAIN + HELD_OUT} are needed")
    return wanted[:TRAIN], wanted[TRAIN:]


def measure_alpaca(file: Path, seeds: Sequence[int], out: Path) -> str:
    """Train with every seed, and let the base and the first adapter answer. Returns tables in Markdown."""
    records, held_out = split_records(file)
    write_jsonl(out / "alpaca.jsonl", records)
    write_jsonl(out / "alpaca-held-out.jsonl", held_out)
    write_jsonl(out / "instructions.jsonl", held_out[:ANSWERED])
    data = [f"data.path={out / 'alpaca.jsonl'}", f"data.val_path={out / 'alpaca-held-out.jsonl'}"]
    runs = [train(out, f"alpaca-{seed}", *data, f"train.seed={seed}") for seed in seeds]
    asked = [f"base.path={smollm2()}", f"file={out / 'instructions.jsonl'}"]
    asked += ["decoding.temperature=0", "decoding.max_new_tokens=64"]
    command("adapter-generate", out, "answers-base", *asked)
    command("adapter-generate", out, "answers-adapted", *asked, f"adapter={runs[0]['adapter']}")
    before, after = (read_jsonl(out / f"answers-{which}" / "answers.jsonl") for which in ("base", "adapted"))
    answers = [
        [_cell("\n".join(filter(None, (b["instruction"], b.get("input"))))), _cell(b["answer"]), _cell(a["answer"])]
        for b, a in zip(before, after, strict=True)
    ]
    columns = ["instruction", "base", f"adapted, seed {seeds[0]}"]
    return _losses(dict(zip(map(str, seeds), runs, strict=True))) + "\n" + markdown_table(columns, answers)


def measure_chat(file: Path, seed: int, out: Path) -> str:
    """Train on the records as conversations in the model's own chat template. Returns a table in Markdown."""
    for name, records in zip(("chat", "chat-held-out"), split_records(file), strict=True):
        write_jsonl(out / f"{name}.jsonl", map(_conversation, records))
    data = [f"data.path={out / 'chat.jsonl'}", f"data.val_path={out / 'chat-held-out.jsonl'}", "data.template=chat"]
    return _losses({str(seed): train(out, f"chat-{seed}", *data, f"train.seed={seed}")})


def _conversation(record: Mapping[str, str]) -> dict[str, Any]:
    question = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]}


def measure_photos(caltech: Path, seed: int, out: Path) -> str:
    """Train with and without photos, and answer the questions about other photos. Returns a table in Markdown."""
    questions, shuffled = out / f"photos-{seed}", out / f"photos-shuffled-{seed}"
    if not questions.exists():
        write_questions(caltech, questions, seed)
    if not shuffled.exists():
        shuffle_images(questions, shuffled, seed)
    vision = ["kind=timm", "name=tf_efficientnet_lite0", f"weights={efficientnet_lite0()}"]
    sees = [f"vision.encoder.{word}" for word in vision]
    data = [f"data.path={questions / 'train.jsonl'}", "data.template=scienceqa", "data.val_fraction=0"]
    recipe = [*data, "optimizer.base_lr=0.128", f"train.seed={seed}"]
    sighted = train(out, f"photos-conditioned-{seed}", *recipe, *sees)
    blind = train(out, f"photos-text-only-{seed}", *recipe)
    asked = {
        "no adapter": (questions, []),
        "no adapter, likeliest option": (questions, ["reading=likelihood"]),
        "text-only adapter": (questions, [f"adapter={blind['adapter']}"]),
        "image-conditioned": (questions, [f"adapter={sighted['adapter']}", *sees]),
        "image-conditioned, photos shuffled": (shuffled, [f"adapter={sighted['adapter']}", *sees]),
    }
    rows = []
    for name, (folder, words) in asked.items():
        run = f"eval-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        given = [f"base.path={smollm2()}", "task=scienceqa", f"data.path={folder}", "data.template=scienceqa"]
        result = command("adapter-eval", out, run, *given, "data.max_length=200", *words)
        rows.append([name, f"{result['accuracy']:.1f}%", str(result["no_answer"]), _cost(result["cost"])])
    for name, result in (("training, text-only", blind), ("training, image-conditioned", sighted)):
        rows.append([name, "", "", f"{result['trainable_parameters']:,} parameters; {_cost(result['cost'])}"])
    return markdown_table(["adapter", "right", "no answer", "cost"], rows)


def write_questions(caltech: Path, folder: Path, seed: int) -> None:
    """Write questions about test photos in ScienceQA's layout, and `train.jsonl` with questions about training photos.

    Options are drawn anew for each question.
    """
    split = read_json(caltech / "split_zhou_Caltech101.json")
    names = sorted({name for _, _, name in split["train"]})
    rng = random.Random(seed)
    with atomic_folder(folder) as new:
        train_photos = rng.sample(split["train"], len(split["train"]))
        records = []
        for i in range(TRAIN_QUESTIONS):
            path, _, name = train_photos[i % len(train_photos)]
            problem = make_problem("", name, names, rng)
            image = str((caltech / "101_ObjectCategories" / path).absolute())
            records.append({**problem.record(), "image": image, "output": answer_text(problem)})
        write_jsonl(new / "train.jsonl", records)
        problems = {}
        for i, (path, _, name) in enumerate(rng.sample(split["test"], TEST_QUESTIONS)):
            problem = make_problem(str(i), name, names, rng)
            problems[problem.pid] = {
                "question": problem.question,
                "choices": problem.choices,
                "answer": problem.answer,
                "image": f"image{Path(path).suffix}",
                "subject": problem.subject,
                "grade": f"grade{problem.grade}",
                "split": "test",
            }
            image_folder = new / "images" / "test" / problem.pid
            image_folder.mkdir(parents=True)
            shutil.copyfile(caltech / "101_ObjectCategories" / path, image_folder / f"image{Path(path).suffix}")
        write_json(new / "problems.json", problems)
        write_json(new / "pid_splits.json", {"test": list(problems)})


def make_problem(pid: str, name: str, names: Sequence[str], rng: random.Random) -> Problem:
    """Return the question which of four classes is in a photo."""
    choices = [*rng.sample([other for other in names if other != name], OPTIONS - 1), name]
    rng.shuffle(choices)
    words = tuple(choice.replace("_", " ") for choice in choices)
    return Problem(
        pid=pid,
        question="What is in the photo?",
        choices=words,
        answer=choices.index(name),
        hint="",
        image="",
        subject="natural science",
        grade=1,
    )


def answer_text(problem: Problem) -> str:
    """Return the answer in words; which letter an option has is another skill, of which the photo says nothing."""
    return f"The answer is {problem.choices[problem.answer]}."


def _losses(runs: Mapping[str, Mapping[str, Any]]) -> str:
    columns = ["seed", "held-out loss before", "after", "cost"]
    rows = [
        [seed, f"{run['base_val_loss']:.4f}", f"{run['val_loss']:.4f}", _cost(run["cost"])]
        for seed, run in runs.items()
    ]
    if len(runs) > 1:
        spread = [[run[key] for run in runs.values()] for key in ("base_val_loss", "val_loss")]
        rows.append(["mean ± std", *(mean_and_deviation(losses, 4) for losses in spread), ""])
    return markdown_table(columns, rows)


def _cost(cost: Mapping[str, Any]) -> str:
    minutes = f"{cost['minutes']:.1f} min{' after an interruption' if cost['resumed'] else ''}"
    return f"{minutes}, {cost['cpu_minutes']:.1f} CPU min, {cost['peak_gib']:.1f} GiB, load {cost['load']:.0f}"


def _cell(text: str) -> str:
    return text.strip().replace("\n", "<br>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpaca", type=Path, metavar="FILE", help="train on this file of Alpaca's records")
    parser.add_argument("--chat", type=Path, metavar="FILE", help="train on this file of Alpaca's records as chats")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="train on questions about Caltech-101's photos")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of alpaca; the others take the first")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="folder of all runs")
    given = parser.parse_args()
    out = given.out.absolute()
    if not (given.alpaca or given.chat or given.photos):
        parser.error("give at least one of --alpaca, --chat, --photos")
    if given.alpaca:
        print(measure_alpaca(given.alpaca, given.seeds, out))
    if given.chat:
        print(measure_chat(given.chat, given.seeds[0], out))
    if given.photos:
        print(measure_photos(given.photos, given.seeds[0], out))


if __name__ == "__main__":
    main()
