"""The words of tables, plots and pages, in English and Russian. One dictionary; knows nothing of records or layout.

`words(lang)` gives the texts of one language. Gaps in braces are filled by the caller with already formatted text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Lang = Literal["en", "ru"]

WORDS: Mapping[str, tuple[str, str]] = {
    # strategies, by the value of `Strategy`, and metrics, by their name
    "strategy_prompting": ("prompting", "без обучения"),
    "strategy_full": ("full fine-tuning", "полное дообучение"),
    "strategy_p-tuning": ("p-tuning", "p-tuning"),
    "strategy_adapters": ("adapters", "адаптеры"),
    "metric_accuracy": ("accuracy", "доля верных ответов (accuracy)"),
    # columns
    "method": ("Method", "Метод"),
    "strategy": ("Strategy", "Стратегия"),
    "seed": ("Seed", "Запуск (seed)"),
    "score": ("Score", "Оценка"),
    "interval": ("95 % interval", "95-процентный интервал"),
    "interval_short": ("95 %", "95 %"),
    "parameters": ("Trained parameters", "Обучаемых параметров"),
    "stored": ("Stored", "Хранится"),
    "train_time": ("Training time", "Время обучения"),
    "speed": ("Training, tokens/s", "Обучение, токенов/с"),
    "train_memory": ("Peak memory, training", "Пик памяти при обучении"),
    "eval_memory": ("Peak memory, evaluating", "Пик памяти при ответах"),
    "per_1000": ("Time per 1,000 rows", "Время на 1000 строк"),
    "forgetting": ("Forgetting, nats per token", "Забывание, нат на токен"),
    "dash": ("–", "–"),
    "seeds_note": (
        "Scores are means over {seeds} seeds, intervals the mean of the seeds' intervals; below, the range of the "
        "seeds. Time and memory are those of runs that shared no pass over the base with others.",
        "Оценка — среднее по запускам (seed: {seeds}), интервал — среднее их интервалов, под ним размах по запускам. "
        "Время и память — запусков, которые шли через модель отдельно от других.",
    ),
    # the narrow table of the terminal: two lines a row, these head the columns
    "head_method": ("Method\nstrategy", "Метод\nстратегия"),
    "head_score": ("Score\n95 % interval", "Оценка\n95 % интервал"),
    "head_stored": ("Stored\nparameters", "Хранится\nпараметров"),
    "head_train": ("Training\ntokens/s", "Обучение\nтокенов/с"),
    "head_memory": ("Memory, train\nanswering", "Память, обуч.\nответы"),
    "head_1000": ("1,000 rows\nforgetting", "1000 строк\nзабывание"),
    "table_note": (
        "Memory: peak while training and while answering. 1,000 rows: time to answer them. Parameters: trained ones. "
        "Forgetting: rise of the loss on general text, nats per token.",
        "Память: пик при обучении и при ответах. 1000 строк: время ответа на них. Параметров: обучаемых. Забывание: "
        "рост потерь на тексте общего содержания, нат на токен.",
    ),
    "range": ("seeds {low}–{high}", "запуски {low}–{high}"),
    "measured_on": (
        "Measured: {metric} on n = {n} test rows.",
        "Измерено: {metric}, тестовых строк n = {n}.",
    ),
    # pairs
    "pair": ("Pair", "Пара"),
    "difference": ("Difference", "Разница"),
    "p_adjusted": ("p by example (Holm)", "p по примерам (Холм)"),
    "p_by_seed": ("p by seed", "p по запускам"),
    "verdict": ("Verdict", "Вывод"),
    "better": ("{name} is better", "лучше {name}"),
    "no_difference": ("no difference shown", "разница не показана"),
    "pairs_title": ("Is the difference real?", "Есть ли разница на самом деле?"),
    "pairs_intro": (
        "Both methods of a pair answered the same test rows, so they are compared row by row: McNemar's exact test for "
        "right and wrong answers, a permutation test otherwise, and the verdict is corrected for the number of "
        "pairs (Holm). The interval is that of the pair alone. “No difference shown” does not mean “equal”: the interval "
        "tells how large a difference may still be hiding.",
        "Оба метода пары отвечали на одни и те же тестовые строки, поэтому сравниваются строка за строкой: точным "
        "критерием Макнемара для верных и неверных ответов, иначе перестановочным, а вывод сделан с поправкой на "
        "число пар (Холм). Интервал относится к одной паре без поправки. «Разница не показана» "
        "не значит «одинаковы»: интервал говорит, какая разница ещё может скрываться.",
    ),
    # recommendation
    "only_prompting": (
        "Only prompting was measured: there is nothing trained to choose.",
        "Измерен только запрос без обучения: выбирать среди обученного нечего.",
    ),
    "nothing": ("Nothing was measured.", "Ничего не измерено."),
    "prompting_enough": (
        "No method was shown to be better than prompting ({name}, {score}).",
        "Не показано, что хоть один метод лучше запроса без обучения ({name}, {score}).",
    ),
    "prompting_advice": (
        "Prompting needs no training and stores nothing, so start with it; more training rows or more test rows may "
        "change this.",
        "Он не требует обучения и ничего не хранит, так что начните с него; если добавить обучающих или тестовых "
        "строк, вывод может измениться.",
    ),
    "prompting_best_trained": (
        "The best trained method is {name} ({score}).",
        "Лучший из обученных методов — {name} ({score}).",
    ),
    "choose_clear": (
        "Choose {name}: {score}, better than every other method here.",
        "Берите {name}: {score}, лучше всех остальных методов в этом сравнении.",
    ),
    "choose_only": ("Choose {name}: {score}.", "Берите {name}: {score}."),
    "choose_leader": (
        "Choose {name}: {score}, the highest score, and the least to store among those that no difference was shown to "
        "({tied}).",
        "Берите {name}: {score}. Это лучшая оценка, и хранить нужно меньше всего среди методов, разница с которыми не "
        "показана ({tied}).",
    ),
    "choose_cheapest": (
        "Choose {name}: {score}; it stores least ({stored}) among the methods that no difference was shown between.",
        "Берите {name}: {score}. Хранить нужно меньше всего ({stored}) среди методов, "
        "разница между которыми не показана.",
    ),
    "leader": (
        "The highest score is {leader}'s ({score}), but no difference was shown to {tied}.",
        "Самая высокая оценка у {leader} ({score}), но разница с другими не показана ({tied}).",
    ),
    "may_hide": (
        "How far {name} may really lie from {leader} (95 %): {low} to {high}.",
        "Насколько {name} на деле может отличаться от {leader} (95 %): от {low} до {high}.",
    ),
    "pair_alone": (
        "That interval is of this pair alone and leaves out zero, so a difference is likely; it is not shown, since the "
        "verdict counts how many pairs were compared, and whether seeds agree.",
        "Этот интервал относится только к этой паре и не содержит нуля, так что разница вероятна; показанной она не "
        "считается, потому что вердикт учитывает число сравнённых пар и согласие запусков.",
    ),
    "fastest_both": (
        "Among them {name} is the fastest both to train ({train}) and to answer ({answer} per 1,000 rows).",
        "Из них {name} быстрее всех и обучается ({train}), и отвечает ({answer} на 1000 строк).",
    ),
    "fastest_train": (
        "Fastest to train among them: {name} ({train}).",
        "Быстрее всех из них обучается {name} ({train}).",
    ),
    "fastest_answer": (
        "Fastest to answer: {name} ({answer} per 1,000 rows).",
        "Быстрее всех отвечает {name} ({answer} на 1000 строк).",
    ),
    "gain": (
        "Over prompting ({baseline}) it gains {difference} {interval}.",
        "Выигрыш перед запросом без обучения ({baseline}): {difference} {interval}.",
    ),
    "untested": (
        "No paired tests were made, so none of these differences is shown to be real.",
        "Парные критерии не применялись, так что ни одна из этих разниц не подтверждена.",
    ),
    # page
    "title": ("Comparison of {base}", "Сравнение: {base}"),
    "title_plain": ("Comparison of adaptations", "Сравнение адаптаций"),
    "results": ("Results", "Результаты"),
    "results_intro": (
        "Every line is the same base, measured on the same test rows. The bar shows the score and its 95 % interval.",
        "В каждой строке одна и та же базовая модель, измеренная на одних и тех же тестовых строках. Полоска "
        "показывает оценку и её 95-процентный интервал.",
    ),
    "caveats": ("What limits this comparison", "Что ограничивает это сравнение"),
    "no_caveats": ("The checks found nothing.", "Проверки ничего не нашли."),
    "curves": ("Learning curves", "Кривые обучения"),
    "curves_intro": (
        "What each method reached on the dev rows, and its loss on the training rows, after so many rows seen.",
        "Чего каждый метод достиг на строках для настройки (dev) и какова его ошибка на обучающих строках после "
        "стольких просмотренных строк.",
    ),
    "rows_seen": ("training rows seen", "просмотрено обучающих строк"),
    "dev_score": ("score on dev", "оценка на dev"),
    "train_loss": ("training loss", "функция потерь на обучении"),
    "cost": ("What a score costs", "Чего стоит оценка"),
    "cost_intro": (
        "Higher and further left is better. Prompting stores nothing and trains nothing: it is a dashed line.",
        "Чем выше и левее, тем лучше. Запрос без обучения ничего не хранит и не учится: он показан пунктиром.",
    ),
    "by_bytes": ("Score against stored bytes", "Оценка и объём хранения"),
    "by_seconds": ("Score against training time", "Оценка и время обучения"),
    "bytes_axis": ("stored (log scale)", "хранится (логарифмическая шкала)"),
    "seconds_axis": ("training time, seconds", "время обучения, секунд"),
    "no_points": ("nothing was trained", "ничего не обучалось"),
    "use": ("Use a result", "Как пользоваться результатом"),
    "your_text": ("your text", "ваш текст"),
    "errors": ("Errors per label", "Ошибки по меткам"),
    "errors_intro": (
        "Which labels each method gets wrong, and what it takes them for. Rows: the right label; columns: the answer.",
        "В каких метках ошибается каждый метод и за что их принимает. В строках верная метка, в столбцах ответ.",
    ),
    "label": ("Label", "Метка"),
    "precision": ("Precision", "Точность"),
    "recall": ("Recall", "Полнота"),
    "f1": ("F1", "F1"),
    "support": ("Rows", "Строк"),
    "macro": ("mean of F1 over labels: {f1}", "среднее F1 по меткам: {f1}"),
    "confusion": ("Right label ↓, answer →", "Верная метка ↓, ответ →"),
    "confused": ("Most frequent mistakes", "Самые частые ошибки"),
    "answered": ("Answered", "Ответ"),
    "times": ("Times", "Сколько раз"),
    "more_labels": ("and {n} more labels", "и ещё меток: {n}"),
    "disagree": ("Where the methods disagree", "Где методы расходятся"),
    "disagree_intro": (
        "{shown} of {total} test rows on which the answers differ, drawn at random (always the same ones).",
        "Строк, где ответы расходятся, — {total}; здесь показано {shown}, выбраны случайно (всегда одни и те же).",
    ),
    "disagree_none": ("All methods gave the same answers.", "Все методы ответили одинаково."),
    "all_wrong": ("Rows that every method got wrong", "Строки, где ошиблись все методы"),
    "all_wrong_intro": (
        "{shown} of {total}. Hard rows, or rows whose label is wrong: worth reading.",
        "Всего таких строк: {total}, показано: {shown}. Это трудные строки или строки с неверной меткой, их стоит "
        "прочесть.",
    ),
    "row": ("Test row", "Тестовая строка"),
    "right_label": ("Right label", "Верная метка"),
    "right": ("right", "верно"),
    "wrong": ("wrong", "неверно"),
    "cut": ("… and {n} more characters", "… и ещё знаков: {n}"),
    "made": ("How this was made", "Как это получено"),
    "search": ("Learning-rate search", "Подбор скорости обучения"),
    "learning_rate": ("Learning rate", "Скорость обучения"),
    "steps": ("Steps", "Шагов"),
    "dev_loss": ("Dev loss", "Потери на dev"),
    "dev": ("Dev score", "Оценка на dev"),
    "chosen": ("chosen", "выбрана"),
    "diverged": ("diverged", "разошлось"),
    "yes": ("yes", "да"),
    "no": ("no", "нет"),
    "settings": ("Settings of each method", "Настройки методов"),
    "train_rows": ("Training rows", "Обучающих строк"),
    "best_step": ("Best step", "Лучший шаг"),
    "adaptation": ("Adaptation", "Адаптация"),
    "base": ("Base", "Базовая модель"),
    "task": ("Task and data", "Задача и данные"),
    "training": ("Training", "Обучение"),
    "environment": ("Machine and versions", "Машина и версии"),
    "command": ("Command", "Команда"),
    "footer": (
        "Made by tritune from comparison.json; nothing on this page is loaded from elsewhere.",
        "Составлено программой tritune по comparison.json; страница ничего не загружает извне.",
    ),
    # facts of a record, by their key
    "fact_name": ("name", "имя"),
    "fact_dtype": ("number format", "формат чисел"),
    "fact_quantised": ("weights kept in", "веса хранятся в"),
    "fact_bytes": ("weights in memory", "веса в памяти"),
    "fact_digests": ("sha256", "sha256"),
    "fact_weights": ("weights", "веса"),
    "fact_config": ("configuration", "конфигурация"),
    "fact_tokenizer": ("tokenizer", "токенизатор"),
    "fact_kind": ("kind", "вид"),
    "fact_text_field": ("text field", "поле текста"),
    "fact_label_field": ("label field", "поле метки"),
    "fact_rows": ("rows", "строк"),
    "fact_rows_available": ("rows available", "строк всего"),
    "fact_train": ("train", "обучение"),
    "fact_dev": ("dev", "настройка (dev)"),
    "fact_test": ("test", "проверка (test)"),
    "fact_labels": ("labels", "метки"),
    "fact_repeated_rows": ("repeated rows", "повторы строк"),
    "fact_contradicting_rows": ("contradicting rows", "противоречивые строки"),
    "fact_duplicates_across_splits": ("duplicates across splits", "повторы между частями"),
    "fact_near_duplicates": ("near-duplicates of train in test", "почти повторы обучения в проверке"),
    "fact_template": ("prompt template", "шаблон запроса"),
    "fact_template_digest": ("sha256 of the template", "sha256 шаблона"),
    "fact_sources": ("sources", "источники"),
    "fact_notes": ("notes", "примечания"),
    "fact_seeds": ("seeds", "запуски (seed)"),
    "fact_shots": ("examples in few-shot prompting", "примеров в few-shot"),
    "fact_rates": ("learning rates, as factors of the default", "скорости обучения, в долях обычной"),
    "fact_search_share": ("share of all steps in the search", "доля шагов на перебор"),
    "fact_training": ("training", "обучение"),
    "fact_epochs": ("epochs", "эпох"),
    "fact_learning_rate": ("learning rate", "скорость обучения"),
    "fact_schedule": ("schedule", "расписание"),
    "fact_warmup": ("warm-up", "разогрев"),
    "fact_weight_decay": ("weight decay", "затухание весов"),
    "fact_clip": ("gradient clipping", "ограничение градиента"),
    "fact_batch_tokens": ("tokens per batch", "токенов в пакете"),
    "fact_accumulate": ("batches per step", "пакетов на шаг"),
    "fact_evaluations": ("evaluations on dev", "проверок на dev"),
    "fact_patience": ("patience", "терпение"),
    "fact_system": ("system", "система"),
    "fact_processor": ("processor", "процессор"),
    "fact_threads": ("threads", "потоков"),
    "fact_gpu": ("GPU", "GPU"),
    # explain
    "this_run": ("In this run", "В этом сравнении"),
    "no_entries": ("This run did not try this strategy.", "Эта стратегия в этом сравнении не участвовала."),
    "figures": (
        "**{name}**: {metric} {score}, interval {low} to {high} (95 %, n = {n}). It trained {parameters} numbers in "
        "{train} and stores {stored}; 1,000 answers take {answer}.",
        "**{name}**: {metric} — {score}, 95-процентный интервал от {low} до {high} (n = {n}). Обучено чисел: "
        "{parameters}, за {train}; хранится {stored}; 1000 ответов занимают {answer}.",
    ),
    "figures_prompting": (
        "**{name}**: {metric} {score}, interval {low} to {high} (95 %, n = {n}). Nothing was trained or stored; 1,000 "
        "answers take {answer}.",
        "**{name}**: {metric} — {score}, 95-процентный интервал от {low} до {high} (n = {n}). Ничего не обучено и не "
        "хранится; 1000 ответов занимают {answer}.",
    ),
    "against": (
        "Against {other}: {difference} {interval}: {verdict}.",
        "Против {other}: {difference} {interval}: {verdict}.",
    ),
    # units
    "units_bytes": ("B KB MB GB TB", "Б КБ МБ ГБ ТБ"),
    "units_count": (" K M B", " тыс. млн млрд"),
    "unit_second": ("s", "с"),
    "unit_minute": ("min", "мин"),
    "unit_hour": ("h", "ч"),
}


def words(lang: Lang) -> Mapping[str, str]:
    """All texts of one language, by key.

    Raises:
        ValueError: a language other than "en" and "ru".
    """
    if lang not in ("en", "ru"):
        raise ValueError(f"no words for language {lang!r}; there are 'en' and 'ru'")
    column = 0 if lang == "en" else 1
    return {key: texts[column] for key, texts in WORDS.items()}
