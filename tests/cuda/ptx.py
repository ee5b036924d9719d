"""The PTX that NVRTC makes of our kernels → C++ that does the same on emulated_device.h, instruction by instruction.

A register is a variable with the bits it holds, a kernel a function of its arguments' addresses. Only what our kernels
compile to is known; anything else is an AssertionError that names it. Source: PTX ISA 8.7, "Instruction Set".
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

from starling.model.ops.cuda.nvrtc import compile_source

DECLARED = re.compile(
    r"\.(?:visible \.)?(?P<kind>entry|func)\s*(?:\(\.param[^)]*?(?P<result>\w+)\[\d+\]\))?\s*(?P<name>\w+)\s*"
    r"\((?P<parameters>[^)]*)\)[^{;]*\{"
)
STATEMENT = re.compile(r"\s*(?:(?P<brace>[{}])|\$(?P<label>\w+):|(?P<text>(?:[^;{}]|\{[^}]*\})+);)")
SPECIAL = {
    f"%{name}.{axis}": f"{place}.{axis}"
    for name, place in (("tid", "threadIdx"), ("ntid", "blockDim"), ("ctaid", "blockIdx"), ("nctaid", "gridDim"))
    for axis in "xyz"
}
REGISTERS = {"pred": "bool", "b16": "u16", "b32": "u32", "f32": "u32", "b64": "u64", "f64": "u64"}
TYPES = {f"{letter}{bits}": f"u{bits}" for letter in "bu" for bits in (8, 16, 32, 64)}
TYPES |= {f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)} | {
    "f16x2": "u32", "f32": "float", "f64": "double", "pred": "bool",
}  # fmt: skip
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "and": "&", "or": "|", "xor": "^"}
CALLS = {
    "brev.b32": "bit_reverse", "bfind.shiftamt.u32": "find_highest_shift", "lop3.b32": "lop3", "bfi.b32": "bit_insert",
    "shl.b32": "shl<u32>", "shl.b64": "shl<u64>", "shr.u32": "shr<u32>", "shr.u64": "shr<u64>", "shr.s32": "shr<int>",
    "mul.hi.u64": "multiply_high", "min.f32": "fminf", "max.f32": "fmaxf", "fma.rn.f32": "fmaf",
    "rsqrt.approx.f32": "reciprocal_root", "ex2.approx.f32": "exp2f", "ex2.approx.ftz.f32": "exp2_flushed",
    "sub.rn.f16x2": "half2_sub", "mul.rn.f16x2": "half2_mul", "fma.rn.f16x2": "half2_fma",
}  # fmt: skip
# For cvta: from a space's own addresses to generic ones, which are the host's, and back.
WINDOWS = {"shared": "+ shared_window()", "to.shared": "- shared_window()", "to.global": "", "local": ""}


@lru_cache(maxsize=32)  # several tests read the same
def ptx_of(source: str, arch: int) -> str:
    """The PTX of native/`source`.cu, or of another file, by its absolute path without suffix."""
    return compile_source(source, arch, ptx=True)[0].decode().rstrip("\0")


def kernels_of(source: str, arch: int) -> list[str]:
    """The same, split into kernels, each from its name on."""
    return ptx_of(source, arch).split(".entry ")[1:]


def translate(ptx: str) -> str:
    """C++ of every kernel and function. Where kernels cannot begin early, they wait for the previous one at once."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    target = re.search(r"\.target sm_(\d+)", ptx)
    assert target
    begin = "" if int(target[1]) >= 90 else "wait_for_previous_kernel();"
    parts = []
    for found in DECLARED.finditer(ptx):
        names = re.findall(r"(\w+)(?:\[\d+\])?\s*(?:,|$)", found["parameters"].strip())
        if found["kind"] == "entry":
            parts.append(f"static void {found['name']}(void** arguments) {{ {begin}")
            parts += [f"u8* const {name} = (u8*)arguments[{index}];" for index, name in enumerate(names)]
        else:
            names = [*filter(None, [found["result"]]), *names]
            parts.append(f"static void {found['name']}({', '.join(f'u8* {name}' for name in names)}) {{")
        parts += body(ptx, found.end())
    return "\n".join(parts)


def body(ptx: str, at: int) -> Iterator[str]:
    """The statements from `at` to the brace that closes what is open there."""
    depth = 1
    while depth:
        found = STATEMENT.match(ptx, at)
        assert found, ptx[at : at + 200]
        at = found.end()
        if found["brace"]:
            depth += 1 if found["brace"] == "{" else -1
            yield found["brace"]
        else:
            yield f"{found['label']}:;" if found["label"] else statement(" ".join(found["text"].split()))


def statement(text: str) -> str:
    if text.startswith(".pragma"):
        return ""
    declared = re.fullmatch(r"\.reg \.(\w+) %?(\w+)(?:<(\d+)>)?", text)
    if declared:
        kind, name, count = declared.groups()
        names = [f"{name}{index}" for index in range(int(count))] if count else [name]
        return f"{REGISTERS[kind]} {', '.join(names)};"
    declared = re.fullmatch(r"\.(?:param|local) (?:\.align \d+ )?\.b(\d+) (\w+)(?:\[(\d+)\])?", text)
    if declared:
        bits, name, count = declared.groups()
        return f"alignas(16) u8 {name}[{int(bits) // 8 * int(count or 1)}];"
    called = re.fullmatch(r"call\.uni (?:\((\w+)\), )?(\w+), \(([^)]*)\)", text)
    if called:
        result, name, arguments = called.groups()
        return f"{name}({', '.join(filter(None, [result, *map(str.strip, arguments.split(','))]))});"
    found = re.fullmatch(r"(?:@(!?)%(\w+) )?([a-z][\w.:]*) ?(.*)", text)
    assert found, text
    negated, predicate, code, operands = found.groups()
    done = instruction(code, [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{])+", operands)])
    return f"if ({negated}{predicate}) {{ {done} }}" if predicate else done


# -- operands ----------------------------------------------------------------------------------------------------------


def value(operand: str) -> str:
    """The bits of a register or of a constant, as a C++ expression."""
    if operand in SPECIAL:
        return SPECIAL[operand]
    if operand.startswith("__local_depot"):
        return f"(u64){operand}"
    if re.fullmatch(r"0[fd][0-9A-F]+", operand):
        return f"0x{operand[2:]}ull"
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", operand):
        return f"(u64){operand}{'ll' if int(operand, 0) < 2**63 else 'ull'}"
    assert re.fullmatch(r"%?[a-zA-Z_]\w*", operand), operand
    return operand.lstrip("%")


def typed(operand: str, kind: str) -> str:
    return f"get<{TYPES[kind]}>({value(operand)})"


def listed(operand: str) -> list[str]:
    """The operands of a vector, or the only one."""
    return [part.strip() for part in operand.strip("{}").split(",")]


def address(operand: str) -> str:
    found = re.fullmatch(r"\[(%?\w+)(?:\+(-?\d+))?\]", operand)
    assert found, operand
    return f"({value(found[1])} + {found[2] or 0})"


def place(space: str, operand: str, kind: str, count: int, use: str) -> str:
    """The host address of `count` values, for `use`: whether they are written, and by an atomic instruction."""
    at = address(operand)
    if space == "param":
        return at
    size = f"{count} * sizeof({TYPES[kind]})"
    return f"host_at({at}, {size})" if space == "local" else f"{space}_at({at}, {size}, {use})"


# -- instructions ------------------------------------------------------------------------------------------------------


def instruction(code: str, operands: list[str]) -> str:
    if code in WHOLE:
        return WHOLE[code](*operands)
    name, *rest = code.split(".")
    if name in FAMILIES:
        return FAMILIES[name](rest, *operands)
    target, *sources = operands
    return f"{value(target)} = put<{TYPES[rest[-1]]}>({expression(code, sources)});"


def expression(code: str, sources: list[str]) -> str:
    name, *how, kind = code.split(".")
    of = [typed(source, kind) for source in sources]
    if code in CALLS:
        return f"{CALLS[code]}({', '.join(of)})"
    if name in ("min", "max"):
        return f"std::{name}({of[0]}, {of[1]})"
    if name in ("not", "neg"):
        return f"{'!' if kind == 'pred' else '~' if name == 'not' else '-'}{of[0]}"
    if kind.startswith("f"):
        assert how == ["rn"], code  # rounded by itself
        return f"1.0f / {of[0]}" if name == "rcp" else f"{of[0]} {INFIX[name]} {of[1]}"
    if name in ("div", "rem"):
        return f"{of[0]} {INFIX[name]} {of[1]}"
    assert not how or how == ["lo"], code
    wide = [f"(u64){part}" for part in of]  # so that overflow wraps around and is not undefined
    return f"{wide[0]} * {wide[1]} + {wide[2]}" if name == "mad" else f"{wide[0]} {INFIX[name]} {wide[1]}"


def set_predicate(rest: list[str], target: str, left: str, right: str) -> str:
    how, kind = rest
    a, b = typed(left, kind), typed(right, kind)
    unordered = f"std::isnan({a}) || std::isnan({b})"
    if how == "nan":
        found = unordered
    elif how in COMPARISONS:
        assert (how, kind) != ("ne", "f32")  # false for NaN, where C++'s != is true
        found = f"{a} {COMPARISONS[how]} {b}"
    else:
        found = f"{unordered} || {a} {COMPARISONS[how[:2]]} {b}"
    return f"{value(target)} = {found};"


def select(_rest: list[str], target: str, yes: str, no: str, which: str) -> str:
    return f"{value(target)} = {value(which)} ? {value(yes)} : {value(no)};"


def move(rest: list[str], target: str, source: str) -> str:
    (kind,) = rest
    half = 0 if kind == "pred" else int(kind[1:]) // 2
    if target.startswith("{"):
        low, high = map(value, listed(target))
        return f"{{ const u64 all = {value(source)}; {low} = all; {high} = all >> {half}; }}"
    if source.startswith("{"):
        low, high = map(value, listed(source))
        return f"{value(target)} = {low} | (u64){high} << {half};"
    return f"{value(target)} = {value(source)}{' != 0' if kind == 'pred' else ''};"


def convert(rest: list[str], target: str, *sources: str) -> str:
    *_, to, kind = rest
    if to == "f16x2":
        found = f"pack_halves({typed(sources[1], kind)}, {typed(sources[0], kind)})"  # the first is the upper half
    elif to == "f16":
        found = f"float_to_half({typed(sources[0], kind)})"
    elif kind == "f16":
        found = f"put<{TYPES[to]}>(half_to_float({value(sources[0])}))"
    else:
        assert to.startswith("f") or not kind.startswith("f"), rest
        found = f"put<{TYPES[to]}>(({TYPES[to]}){typed(sources[0], kind)})"
    return f"{value(target)} = {found};"


def convert_address(rest: list[str], target: str, source: str) -> str:
    return f"{value(target)} = {value(source)} {WINDOWS['.'.join(rest[:-1])]};"


def access(name: str, rest: list[str], first: str, second: str) -> str:
    how = ".".join(rest)
    *rest, kind = rest
    space = rest.pop(0) if rest and rest[0] in ("global", "shared", "local", "param") else "generic"
    vector, where = (second, first) if name == "st" else (first, second)
    parts = listed(vector)
    assert rest == ([f"v{len(parts)}"] if len(parts) > 1 else []), how  # weak, through the coherent path
    at = place(space, where, kind, len(parts), "true" if name == "st" else "false")
    steps = []
    for index, part in enumerate(parts):
        slot = f"at + {index} * sizeof({TYPES[kind]})"
        if name == "st":
            steps.append(f"store<{TYPES[kind]}>({slot}, {value(part)});")
        else:
            steps.append(f"{value(part)} = load<{TYPES[kind]}>({slot});")
    return f"{{ u8* const at = {at}; {' '.join(steps)} }}"


def atomic(rest: list[str], *operands: str) -> str:
    """And red, which does not return what was there."""
    space, how, kind = rest
    *targets, where, operand = operands
    found = f"atomic_{how}<{TYPES[kind]}>({place(space, where, kind, 1, 'true, true')}, {value(operand)});"
    return f"{value(targets[0])} = {found}" if targets else found


def branch(_rest: list[str], label: str) -> str:
    return f"goto {label.lstrip('$')};"


def shuffle(rest: list[str], target: str, source: str, by: str, clamp: str, mask: str) -> str:
    register, *valid = map(value, target.split("|"))
    found = f"shuffle_{rest[1]}({', '.join(map(value, (source, by, clamp)))}, valid, {value(mask)})"
    return f"{{ bool valid; {register} = {found}; {''.join(f'{name} = valid;' for name in valid)} }}"


def multiply_wide(to: str, kind: str, target: str, left: str, right: str) -> str:
    return f"{value(target)} = put<{to}>(({to}){typed(left, kind)} * ({to}){typed(right, kind)});"


def load_matrices(transposed: str, target: str, where: str) -> str:
    taken = " ".join(f"{value(part)} = m[{index}];" for index, part in enumerate(listed(target)))
    return f"{{ u32 m[4]; load_matrices(m, {address(where)}, {transposed}); {taken} }}"


def multiply_matrices(target: str, left: str, right: str, addend: str) -> str:
    a, b = (", ".join(map(value, listed(part))) for part in (left, right))
    c = ", ".join(typed(part, "f32") for part in listed(addend))
    taken = " ".join(f"{value(part)} = put<float>(c[{index}]);" for index, part in enumerate(listed(target)))
    return f"{{ float c[4] = {{{c}}}; const u32 a[4] = {{{a}}}, b[2] = {{{b}}}; mma_m16n8k16(c, a, b); {taken} }}"


def copy_async(to: str, source: str, size: str, read: str, _policy: str = "") -> str:
    assert size == "16"
    return f"copy_async({address(to)}, {address(source)}, (u32){value(read)});"


def at_barrier(barrier: str) -> str:
    assert barrier == "0"
    return "block_barrier();"


FAMILIES: dict[str, Callable[..., str]] = {
    "ld": partial(access, "ld"),
    "st": partial(access, "st"),
    "setp": set_predicate,
    "selp": select,
    "mov": move,
    "cvt": convert,
    "cvta": convert_address,
    "atom": atomic,
    "red": atomic,
    "bra": branch,
    "ret": lambda _rest: "return;",
    "shfl": shuffle,
}
WHOLE: dict[str, Callable[..., str]] = {
    "mul.wide.s32": partial(multiply_wide, "i64", "s32"),
    "mul.wide.u32": partial(multiply_wide, "u64", "u32"),
    "bar.sync": at_barrier,
    "bar.warp.sync": lambda mask: f"warp_sync({value(mask)});",
    "vote.sync.ballot.b32": lambda target, mine, mask: f"{value(target)} = ballot({value(mine)}, {value(mask)});",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16": partial(load_matrices, "false"),
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": partial(load_matrices, "true"),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": multiply_matrices,
    "cp.async.cg.shared.global": copy_async,
    "cp.async.cg.shared.global.L2::cache_hint": copy_async,
    "cp.async.commit_group": lambda: "commit_copies();",
    "cp.async.wait_group": lambda pending: f"wait_for_copies({pending});",
    "cp.async.bulk.prefetch.L2.global.L2::cache_hint": lambda where, size, _policy: (
        f"prefetch({address(where)}, {value(size)});"
    ),
    "createpolicy.fractional.L2::evict_first.b64": lambda policy, _fraction: f"{policy} = 0;",
    "membar.gl": lambda: "fence();",
    "griddepcontrol.wait": lambda: "wait_for_previous_kernel();",
    "griddepcontrol.launch_dependents": lambda: "",
}
