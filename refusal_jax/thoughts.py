"""Marks between which models write their thoughts, before the reply that users see."""

# Opening and closing marks. A template whose prompt ends after an opening one makes the model begin with a thought.
MARKS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),  # Qwen 3, DeepSeek R1, GLM 4.5
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
)
