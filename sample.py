"""How it is used. Prompts become pictures, and given pictures become others.

    python sample.py "a red cube" "a green cone on top of a blue cylinder" --n 8
    python sample.py --edit cube.png --to "a blue cube" --from "a red cube"

It all happens in unclip.py; here are the flags, the files and the manners: what can be wrong with a
command is found before anything is drawn or written, and told in one line. Paths go to stdout,
everything else to stderr.

Next chapter: evaluate.py.
"""

import argparse
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import grid, read_image, to_float, to_uint8, write_png
from unclip import SHIPPED, UnCLIP

BATCH = 4                                    # pictures drawn at a time
# Of each task: how many pictures it makes, the fewest it can make, and the flags that it ignores.
TASKS = {"prompts": (4, 1, ["to", "from", "fixed_noise"]),
         "reconstruct": (1, 1, ["to", "from", "fixed_noise", "prior", "eta"]),
         "vary": (8, 1, ["to", "from", "fixed_noise", "prior"]),
         "interpolate": (7, 2, ["to", "from", "prior", "eta"]),
         "edit": (7, 2, ["fixed_noise", "prior", "eta"])}


def main(argv=None):
    """The command line; returns the exit status: 0 done, 2 a user's error, 130 interrupted."""
    try:
        args = parse(argv)
        unclip = UnCLIP.load(args.weights or SHIPPED / "shapes", find_device(args.device))
        check(args, unclip)
        side = unclip.decoder.config.image_size
        inputs = [to_float(read_image(file, side))[None].to(unclip.device) for file in args.files]
        warn(args, unclip)
        draw(args, unclip, inputs)
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        say(f"sample.py: {error}")
        return 2


def draw(args, unclip, inputs):
    """Draw, save, show; inputs: the pictures given, float (1, 3, H, W)."""
    steps = args.steps or unclip.decoder.config.steps
    steps = len(args.prompts) * math.ceil(args.n / BATCH) * steps
    with tqdm(total=steps or None, unit=" steps", leave=False, disable=None) as bar:
        # None, or a hook replaces what it hooks on
        unclip.decoder.register_forward_pre_hook(lambda *_: bar.update() and None)
        if inputs:
            base = manipulate(args, unclip, *inputs)
            x = base if args.no_upsample else unclip.upsample(base, args.seed)
        else:
            x = unclip.generate(args.prompts, args.n, args.seed, args.prior or "diffusion",
                                args.guidance, args.steps, args.eta, not args.no_upsample, BATCH)
    if args.task == "reconstruct":
        mse = (to_uint8(inputs[0]).float() - to_uint8(base).float()).square().mean()
        say(f"PSNR at {base.shape[-1]} pixels: {10 * torch.log10(255**2 / mse):.1f} dB")
    pictures = to_uint8(x).cpu()
    given = [read_image(file, pictures.shape[-1])[None] for file in args.files]
    sheet = torch.cat([*given[:1], pictures, *given[1:]])        # A, the pictures from A to B, B
    columns = len(sheet) if given else args.n
    save(Path(args.out), pictures, grid(sheet, columns))
    preview(sheet[:columns])


def manipulate(args, unclip, x, x_b=None):
    """The task's pictures (n, 3, H, W), at the decoder's size, from one or two (1, 3, H, W)."""
    how = {"steps": args.steps, "guidance": args.guidance}
    how = {key: value for key, value in how.items() if value is not None}
    if args.task == "vary":
        return unclip.vary(x, args.n, 1.0 if args.eta is None else args.eta, args.seed, **how)
    if args.task == "interpolate":
        return unclip.interpolate(x, x_b, args.n, args.fixed_noise, args.seed, **how)
    if args.task == "edit":
        return unclip.edit(x, *args.captions, args.n, **how)
    return unclip.reconstruct(x, **how)


def save(out, pictures, sheet):
    """Write OUT/000.png … and OUT/grid.png, and print their paths."""
    paths = [out / f"{i:03d}.png" for i in range(len(pictures))] + [out / "grid.png"]
    for path, picture in zip(paths, [*pictures, sheet]):
        write_png(path, picture)
    print("\n".join(map(str, paths)))
    if older := {path for path in out.glob("*.png") if path.stem.isdecimal()} - set(paths):
        say(f"note: {out} still holds pictures of an earlier run, as {min(older).name}")


# ---- The command ---------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):                # argparse itself would print its usage, and leave
        raise ValueError(f"{message}; see --help")


def parse(argv):
    parser = Parser(prog="sample.py", allow_abbrev=False,
                    description="Draw pictures of prompts, or make others of given pictures.")
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help='what to draw, as "a red cube"')
    add("--n", type=int, help="pictures a prompt (default: 4; to vary 8, to interpolate or edit 7)")
    add("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    add("--guidance", type=float, metavar="S",
        help="what z_i and caption weigh, 1: unguided (default: the weights' own; for pictures 1)")
    add("--steps", type=int, help="of the decoder (default: the weights' own; for pictures 50)")
    add("--eta", type=float, metavar="E",
        help="fresh noise, from 0, DDIM, to 1, DDPM (default: the weights' own; to vary 1)")
    add("--no-upsample", action="store_true", help="stop at the decoder's size")
    add("--prior", choices=["diffusion", "ar", "text", "none"],
        help="text: z_t in place of z_i; none: the caption alone (default: diffusion)")
    add("--weights", metavar="DIR", help="default: weights/shapes, which come with the code")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: %(default)s)")
    add("--out", metavar="DIR", default="samples",
        help="gets 000.png, 001.png, ..., and grid.png, all in one (default: %(default)s)")
    group = parser.add_argument_group("with pictures, instead of prompts")
    add = group.add_mutually_exclusive_group().add_argument
    add("--reconstruct", metavar="IMG", help="from its latents; prints the PSNR")
    add("--vary", metavar="IMG", help="others with the same z_i")
    add("--interpolate", nargs=2, metavar=("A", "B"), help="from one to the other")
    add("--edit", metavar="IMG", help="towards a caption")
    group.add_argument("--to", metavar="Y", help="that caption")
    group.add_argument("--from", metavar="Y0", help='the present one (default: "a photo")')
    group.add_argument("--fixed-noise", action="store_true", help="interpolate z_i alone")
    args = parser.parse_intermixed_args(argv)
    tasks = [task for task in TASKS if getattr(args, task) not in (None, [])]
    if not tasks:
        raise ValueError('nothing to draw; try: python sample.py "a red cube"')
    if len(tasks) > 1:
        raise ValueError(f'--{tasks[1]} and the prompt "{args.prompts[0]}": choose one of the two')
    args.task = tasks[0]
    if args.task == "edit" and args.to is None:
        raise ValueError('--edit: say towards what, as in --to "a blue cube"')
    given, base = getattr(args, args.task), getattr(args, "from")
    args.files = [] if given is args.prompts else [given] if isinstance(given, str) else given
    args.captions = [args.to, "a photo" if base is None else base] if args.edit else args.prompts
    return args


def find_device(name):
    """The device of this name, or a clear message."""
    if name == "mps":                        # it lacks the float64 that slerp needs
        say("note: --device mps is not supported, drawing on the cpu")
        return "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: not to be had here; try --device cpu") from None
    return name


def check(args, unclip):
    """Find what is wrong before anything is drawn; fill in the number of pictures."""
    (n, fewest, _), T = TASKS[args.task], unclip.part("decoder").diffusion.T
    for key, least, most in (("n", fewest, math.inf), ("seed", 0, math.inf), ("steps", 1, T),
                             ("eta", 0, 1), ("guidance", -100, 100)):
        value = getattr(args, key)
        if value is not None and not least <= value <= most:                       # nor is nan
            choices = f"from {least} to {most}" if most < math.inf else f"{least} or more"
            raise ValueError(f"--{key} {value}: choose {choices}")
    out = Path(args.out)
    try:                                     # would a file go there, or where the folder will be?
        nearest = next(folder for folder in (out, *out.parents) if os.path.lexists(folder))
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OSError(f"--out {out}: can't be written ({error.strerror}); choose another") from None
    if args.captions:
        tokens = unclip.clip.tokenizer(args.captions)
        if args.task == "edit" and tokens[0].equal(tokens[1]):
            raise ValueError(f'--to "{args.to}": that is what it is edited from; choose another')
    if args.task == "reconstruct" and args.n not in (None, 1):
        say("note: --n plays no part here")
        args.n = 1
    args.n = n if args.n is None else args.n


def warn(args, unclip):
    """Tell of what may not be meant as it is understood."""
    for caption in dict.fromkeys(args.captions):
        if unknown := unclip.clip.tokenizer.unknown_words(caption):
            say(f'note: "{caption}" has words that training never saw: {", ".join(unknown)}')
    for key in TASKS[args.task][2]:
        if getattr(args, key) not in (None, False):
            say(f"note: --{key.replace('_', '-')} plays no part here")
    names = {f"{i:03d}.png" for i in range(args.n)} | {"grid.png"}
    for file in map(Path, args.files):
        if file.name in names and file.resolve().parent == Path(args.out).resolve():
            say(f"note: {file} is about to be overwritten; another --out would keep it")


# ---- In the terminal -----------------------------------------------------------------------------

def say(text):
    """One line on stderr, whatever characters there are in a prompt or a path."""
    line = " ".join(text.split())
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=sys.stderr)


def preview(pictures, side=32):
    """The first of the pictures, uint8 (N, 3, H, W): in colour on a terminal, or in characters."""
    room = max(1, (shutil.get_terminal_size().columns + 1) // (side + 1))
    small = F.pad(F.adaptive_avg_pool2d(pictures[:room].float(), side), (0, 1))
    rgb = small.permute(2, 0, 3, 1).flatten(1, 2)[:, :-1]            # (side, width, 3)
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.getenv("TERM") != "dumb":
        code = 16 + (rgb / 51).round().int() @ torch.tensor([36, 6, 1], dtype=torch.int32)
        rows = ["".join(f"\033[38;5;{a};48;5;{b}m▀" for a, b in zip(*pair)) + "\033[0m"
                for pair in code.unflatten(0, (-1, 2)).tolist()]     # two pixels in a character
    else:
        grey = rgb.mean(2).unflatten(0, (-1, 2)).mean(1)
        grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp(min=1)
        rows = ["".join(" .:-=+*#%@"[int(9 * level)] for level in row) for row in grey.tolist()]
    print("\n".join(rows), file=sys.stderr)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="surrogateescape")                 # file names need not be text
    sys.exit(main())
