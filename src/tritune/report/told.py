"""The words of progress lines, in English and Russian. Knows nothing of the work that they tell of.

Errors, and what is said while something is fetched, are English in every language.
"""

from __future__ import annotations

from collections.abc import Mapping

from tritune.report.words import Lang

TOLD: Mapping[str, tuple[str, str]] = {
    # stages
    "read_data": ("read data", "чтение данных"),
    "load": ("load {name}", "загрузка {name}"),
    "train": ("train {method}", "обучение {method}"),
    "seed": ("{method}, seed {seed}", "{method}, запуск {seed}"),
    "rate": ("{method}, rate {rate}", "{method}, скорость обучения {rate}"),
    "predict": ("predict", "ответы"),
    "evaluate": ("evaluate on {split}", "проверка на {split}"),
    # units and figures
    "rows": ("{counted} rows", "{counted} строк"),
    "steps": ("{counted} steps", "{counted} шагов"),
    "speed": ("{rate} tok/s", "{rate} ток/с"),
    "left": ("{time} left", "осталось {time}"),
    "peak": ("peak {size}", "пик {size}"),
    # lines that stay
    "base": (
        "base {name}: {size} parameters, {dtype}, {bytes} on {device}",
        "модель {name}: параметров {size}, {dtype}, {bytes}, устройство {device}",
    ),
    "labels": ("labels of the training rows: {labels}", "метки строк обучения: {labels}"),
    "own_modules": (
        "slower than it could be: the base computes otherwise than our fast modules for its family, and runs on its own",
        "медленнее, чем могло бы быть: модель считает не так, как наши быстрые модули её семейства, и работает на своих",
    ),
    "other_form": (
        "trained on a base quantised to '{trained}', used on '{used}': scores may differ from those of its run",
        "обучено на модели с квантованием «{trained}», здесь «{used}»: оценки могут отличаться от прежних",
    ),
    "measured": (
        "{method}: {metric} {score} (95 % interval {low} to {high}, n = {n}), trained {seconds} s",
        "{method}: {metric} {score} (95-процентный интервал от {low} до {high}, n = {n}), обучение {seconds} с",
    ),
    "ahead": (
        "about {time} for all that follows, at this machine's speed",
        "всё остальное займёт на этой машине около {time}",
    ),
    "fewer": (
        "{train} training rows and {test} test rows, as many as fit into {minutes} min on this machine (--minutes)",
        "строк обучения {train}, тестовых {test}: столько эта машина успеет примерно за {minutes} мин (--minutes)",
    ),
    "diverged": ("{method}: rate {rate} diverged. {why}", "{method}: при скорости {rate} обучение разошлось. {why}"),
    "run_diverged": ("{name} diverged. {why}", "{name}: обучение разошлось. {why}"),
    "stopped_early": ("{name}: stopped early, no better on dev", "{name}: остановлено раньше, на dev уже не лучше"),
    "going_on": (
        "going on in {out}; taken over, measured before: {names}",
        "продолжение в {out}; уже измерено и взято оттуда: {names}",
    ),
    "finished": (
        "{out} is finished: nothing is left to measure; the report is {report}",
        "{out}: всё измерено, делать больше нечего; отчёт — {report}",
    ),
    "not_whole": ("{name} is not whole and will be measured again", "{name}: не всё на месте, будет измерено заново"),
    "kept": ("What was finished is in {folder}.", "Всё, что успело завершиться, лежит в {folder}."),
    "earlier": ("The earlier run is in {folder}.", "Прежний запуск лежит в {folder}."),
}


def told(key: str, lang: Lang, **values: object) -> str:
    """One line or stage; `values` fill its gaps."""
    return TOLD[key][lang == "ru"].format_map(values)
