"""Prompt texts of nano, in the form every DeepSeek-V4 checkpoint ships them. Only the literals are read, never run.

nano was trained on exactly these words, and they are short because its context is small.
"""

TOOLS_TEMPLATE = """## Tools

Call a tool like this:

<{dsml_token}tool_calls>
<{dsml_token}invoke name="$TOOL">
<{dsml_token}parameter name="$KEY" string="true|false">$VALUE</{dsml_token}parameter>
</{dsml_token}invoke>
</{dsml_token}tool_calls>

Think inside {thinking_start_token}...{thinking_end_token} first, if asked to.

{tool_schemas}
"""

REASONING_EFFORT_MAX = "Think for as long as it takes and check every step.\n\n"

response_format_template = "## Response format\n\nAnswer only with JSON that fits this schema:\n{schema}"
