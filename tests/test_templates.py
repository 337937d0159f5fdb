"""Every prompt, option and content-free text, spelled out: each character changes results."""

from tasks import TASKS

ROWS = {
    "SST2": {"sentence": " a gripping , funny film . "},
    "RTE": {"premise": "Ann sold Bob a car.", "hypothesis": "Bob bought a car."},
    "CB": {"premise": "A: I doubt it. B: So he left?", "hypothesis": "he left"},
    "BoolQ": {"passage": "Iron rusts in rain.", "question": "does iron rust"},
    "WSC": {"text": "Bob saw Ann. She smiled.", "span1_text": "Ann", "span2_text": "She"},
    "WIC": {"word": "bank", "sentence1": "A river bank.", "sentence2": "The bank was shut."},
    "MultiRC": {"paragraph": "Leo ran.\nHe fell.", "question": "Who fell?", "answer": "Leo"},
    "Copa": {
        "premise": "The man lost his wallet.",
        "choice1": "He was sad.",
        "choice2": "I found it.",
        "question": "effect",
    },
    "ReCoRD": {
        "passage": "Kim met Lee.\n@highlight\nKim won\n@highlight\nLee lost",
        "query": "Later @placeholder's team thanked @placeholder.",
    },
    "SQuAD": {
        "title": "Tall_Tower",
        "context": "The tower is 9 m tall.",
        "question": "  How tall is it? ",
    },
    "DROP": {"passage": "They scored 3 and 4 points.", "question": "How many points in all?"},
}

PROMPTS = {
    "SST2": "a gripping , funny film . It was",
    "RTE": ('Ann sold Bob a car.\nDoes this mean that "Bob bought a car." is true? Yes or No?\n'),
    "CB": (
        'Suppose A: I doubt it. B: So he left? Can we infer that "he left"? Yes, No, or Maybe?\n'
    ),
    "BoolQ": "Iron rusts in rain. Does iron rust?\n",
    "WSC": (
        "Bob saw Ann. She smiled.\n"
        'In the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n'
    ),
    "WIC": (
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "A river bank.\n"
        "The bank was shut.\n"
    ),
    "MultiRC": (
        "Leo ran.\nHe fell.\n"
        "Question: Who fell?\n"
        'I found this answer "Leo". Is that correct? Yes or No?\n'
    ),
    "Copa": "The man lost his wallet so ",
    "ReCoRD": "Kim met Lee.\n- Kim won\n- Lee lost\n-",
    "SQuAD": (
        "Title: Tall_Tower\nContext: The tower is 9 m tall.\nQuestion: How tall is it?\nAnswer:"
    ),
    "DROP": "Passage: They scored 3 and 4 points.\nQuestion: How many points in all?\nAnswer:",
}

OPTIONS = {
    "SST2": {0: " terrible", 1: " great"},
    "RTE": {0: "Yes", 1: "No"},
    "CB": {0: "Yes", 1: "No", 2: "Maybe"},
    "BoolQ": {True: "Yes", False: "No"},
    "WSC": {0: "No", 1: "Yes"},
    "WIC": {0: "No", 1: "Yes"},
    "MultiRC": {0: "No", 1: "Yes"},
    "Copa": {"He was sad.": "he was sad.", "I found it.": "I found it."},
    "ReCoRD": {
        "Kim": " Later Kim's team thanked Kim.",
        "Lee": " Later Lee's team thanked Lee.",
    },
    "SQuAD": {"9 m": " 9 m\n"},
    "DROP": {"7": " 7\n"},
}

# Yes/No/Maybe tasks: the empty prompt, and the option as it is.
CONTENT_FREE = {
    "SST2": (" It was", {0: " terrible", 1: " great"}),
    "Copa": ("so", {"He was sad.": " he was sad.", "I found it.": " I found it."}),
    "ReCoRD": ("-", OPTIONS["ReCoRD"]),
    **{name: ("", OPTIONS[name]) for name in ("RTE", "CB", "BoolQ", "WSC", "WIC", "MultiRC")},
}


def prompt(name, **row):
    return TASKS[name].template.prompt(row)


def test_every_task_is_spelled_out():
    assert set(ROWS) == set(PROMPTS) == set(OPTIONS) == set(TASKS)
    assert set(CONTENT_FREE) == set(TASKS) - {"SQuAD", "DROP"}


def test_texts():
    for name, task in TASKS.items():
        template, row = task.template, ROWS[name]
        assert template.prompt(row) == PROMPTS[name], name
        assert {each: template.option(row, each) for each in OPTIONS[name]} == OPTIONS[name], name
        if name in CONTENT_FREE:
            text, options = CONTENT_FREE[name]
            assert template.content_free_prompt(row) == text, name
            found = {each: template.content_free_option(row, each) for each in options}
            assert found == options, name


def test_braces_in_a_row_are_text():
    assert prompt("SST2", sentence=" {label} {} %s {") == "{label} {} %s { It was"


def test_sst2_inner_and_outer_spaces():
    assert prompt("SST2", sentence="\thide new  secretions \n") == "hide new  secretions It was"


def test_boolq_question():
    for question, asked in (
        ("is it wet", "Is it wet?"),
        (" is it wet ?", "Is it wet?"),
        ("is it wet? ?\n", "Is it wet?"),
        ("Is NASA old", "Is NASA old?"),
        ("3d printers are new", "3d printers are new?"),
        ("", "?"),
    ):
        assert prompt("BoolQ", passage="It rains.", question=question) == f"It rains. {asked}\n"


def test_wsc_lower_cases_the_pronoun_only():
    row = {"text": "The Cat saw US.", "span1_text": "The Cat", "span2_text": "US"}
    assert prompt("WSC", **row) == (
        "The Cat saw US.\n"
        'In the previous sentence, does the pronoun "us" refer to The Cat? Yes or No?\n'
    )


def test_copa_prompt():
    for premise, question, text in (
        ("The grass grew.", "cause", "The grass grew because "),
        ("The grass grew. ", "effect", "The grass grew so "),
        ("The grass grew", "effect", "The grass grew so "),
        ("He waited...", "effect", "He waited.. so "),
        ("He lives in the U.S. now.", "cause", "He lives in the U.S. now because "),
    ):
        assert prompt("Copa", premise=premise, question=question) == text


def test_copa_option():
    template = TASKS["Copa"].template
    for choice, option in (
        ("The Sun rose.", "the Sun rose."),
        ("I saw Ann.", "I saw Ann."),
        ("NASA called.", "nasa called."),
        ("Rain.", "rain."),
    ):
        assert template.option({"question": "cause"}, choice) == option
    assert template.content_free_prompt({"question": "cause"}) == "because"


def test_record_without_highlights():
    assert prompt("ReCoRD", passage="Kim met Lee @highlight", query="q") == (
        "Kim met Lee @highlight\n-"
    )


def test_drop_question_is_stripped():
    assert prompt("DROP", passage="P.", question=" Q? \n") == "Passage: P.\nQuestion: Q?\nAnswer:"
