"""C++ text of a plan: one function that runs T steps over fixed memory."""

from __future__ import annotations

from collections.abc import Sequence

from bbvi_conv.engine.native.plan import Copy, Instruction, Kernel, Loop, Place, Plan

_HEAD = """
#include <cstring>
#include <exception>
"""

_ENTRY = """
typedef int (*Call)(int64_t);

static int step(char* const* s, Call call) {{
{body}
    return 0;
}}

// Asks for memory that is needed soon, of which rows that are drawn lie far apart.
static inline void fetch(const char* from, int64_t size) {{
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(from + i);
}}

constexpr int64_t AHEAD = 8;

// Runs `steps` steps. s: memory of the slots; moving, feed, size: slots filled anew at every step, from where, by how
// many bytes; drawn, data, width: slots filled with `batch` rows of resident data, from where, by how many bytes a row;
// kept, store, length: slots saved after every step, to where. Returns the steps made, fewer where one has failed.
extern "C" int64_t advance(int64_t steps, char* const* s, Call call,
                           int64_t feeds, const int64_t* moving, const char* const* feed, const int64_t* size,
                           int64_t batch, const int64_t* rows,
                           int64_t gathers, const int64_t* drawn, const char* const* data, const int64_t* width,
                           int64_t stores, const int64_t* kept, char* const* store, const int64_t* length) {{
    for (int64_t t = 0; t < steps; ++t) {{
        for (int64_t i = 0; i < feeds; ++i) std::memcpy(s[moving[i]], feed[i] + t * size[i], size[i]);
        for (int64_t i = 0; i < gathers; ++i)
            for (int64_t b = 0; b < batch; ++b) {{
                if (b + AHEAD < batch) fetch(data[i] + rows[t * batch + b + AHEAD] * width[i], width[i]);
                std::memcpy(s[drawn[i]] + b * width[i], data[i] + rows[t * batch + b] * width[i], width[i]);
            }}
        try {{
            if (step(s, call)) return t;
        }} catch (const std::exception&) {{
            return t;
        }}
        for (int64_t i = 0; i < stores; ++i) std::memcpy(store[i] + t * length[i], s[kept[i]], length[i]);
    }}
    return steps;
}}
"""


def text(plan: Plan) -> str:
    """The whole translation unit."""
    numbers = {id(call): number for number, call in enumerate(plan.calls())}
    lines = _block(plan.code, numbers, "    ")
    return "\n".join((_HEAD, *plan.sources, _ENTRY.format(body="\n".join(lines))))


def _block(code: Sequence[Instruction], numbers: dict[int, int], indent: str, index: str = "") -> list[str]:
    lines: list[str] = []
    for instruction in code:
        if isinstance(instruction, Kernel):
            pairs = zip(instruction.types, instruction.places, strict=True)
            pointers = ", ".join(f"({kind})({_pointer(place)})" for kind, place in pairs)
            lines.append(f"{indent}{instruction.name}({pointers});")
        elif isinstance(instruction, Copy):
            lines.append(indent + _copy(instruction, index))
        elif isinstance(instruction, Loop):
            lines += _loop(instruction, numbers, indent)
        else:
            lines.append(f"{indent}if (call({numbers[id(instruction)]})) return 1;")
    return lines


def _loop(loop: Loop, numbers: dict[int, int], indent: str) -> list[str]:
    index = f"i{len(indent)}"
    order = f"{loop.rounds - 1} - {index}_" if loop.reverse else f"{index}_"
    inner = indent + "    "
    return [
        f"{indent}for (int64_t {index}_ = 0; {index}_ < {loop.rounds}; ++{index}_) {{",
        f"{inner}const int64_t {index} = {order};",
        *_block(loop.before, numbers, inner, index),
        *_block(loop.body, numbers, inner, index),
        *_block(loop.after, numbers, inner, index),
        f"{indent}}}",
    ]


def _pointer(place: Place) -> str:
    return f"s[{place.slot}] + {place.offset}"


def _copy(copy: Copy, index: str) -> str:
    source, target = _pointer(copy.source), _pointer(copy.target)
    if copy.moves == "source":
        source += f" + {index} * {copy.size}"
    elif copy.moves == "target":
        target += f" + {index} * {copy.size}"
    return f"std::memcpy({target}, {source}, {copy.size});"
