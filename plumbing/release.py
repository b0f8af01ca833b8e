"""What the authors' release (cythu/PeBR-R1, MIT licence) sets otherwise: its prompt, and --parity release.

How it reads a response is in rewards.py and grading/algebra_worker.py; docs/differences.md has what each changes.
"""
import hashlib

import data

# Word for word examples/format_prompt/pebr_format.jinja, with the space behind its last header.
RELEASE_PROMPT = f"""Generate an image description based on the question.
Then, provide a rationale to analyze the question.
Next, generate a step-by-step reasoning process to solve the problem. Ensure the steps are logical and concise.
Finally, provide a concise summary of the final answer in the following format: '{data.ANSWER}: xxx'. \
In the section '{data.ANSWER}:', only output the final result. Do not include any explanation or reasoning.

Format your response with the following sections, separated by ###:
""" + data.INSTRUCTION[data.INSTRUCTION.index("###"):].rstrip() + " \n\n"
RL = dict(prompt="release", rules="release", grader="release", advantage_dtype="float32", drop_last=True)
RELEASE = {  # --parity release: over a stage's settings, under the command line
    "sft": dict(prompt="release", cutoff=4096, weight_decay=0.0, max_pixels=768 * 768),  # LLaMA-Factory's defaults
    "sample": RL | dict(max_pixels=4194304, questions_per_rollout=512),  # pebr_sample.yaml
    "1": RL, "2": RL}


def prompt_id(prompt: str) -> str:
    """Eight hex digits that stand for the text of --prompt, own or release, in every report and run."""
    text = RELEASE_PROMPT if prompt == "release" else data.INSTRUCTION
    return hashlib.sha256(text.encode()).hexdigest()[:8]
