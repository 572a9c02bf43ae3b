"""The control tokens of the V4 prompt format, as text. Bars are U+FF5C, the low block is U+2581."""

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
DSML = "｜DSML｜"

# Quick-instruction tokens by the value of a message's `task`.
TASKS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}
EXTRACTED_URL = "<｜extracted_url｜>"

# A prompt cannot be built without these; the rest is needed only by the requests that use it.
REQUIRED = (BOS, EOS, USER, ASSISTANT, THINK_OPEN, THINK_CLOSE, DSML)
PROMPT_TOKENS = (*REQUIRED, LATEST_REMINDER, *TASKS.values(), EXTRACTED_URL)

# Markup that carries meaning in a completion: decoding never hides it, whatever flags tokenizer.json gives it.
MARKUP = (THINK_OPEN, THINK_CLOSE, DSML)
