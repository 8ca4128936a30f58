"""How unCLIP is used: prompts become pictures, and given pictures become others.

    python sample.py "a red cube" "a green cone on top of a blue cylinder" --n 8
    python sample.py "a red cube" --show         # and steps.png: how the first one came about
    python sample.py --edit cube.png --to "a blue cube" --from "a red cube"

A wrong command is refused before anything is written. Pictures of prompts are
written as they are drawn. Paths go to stdout, everything else to stderr. Next chapter: shapes.py.
"""

import math
import os
import shutil
import sys
from inspect import signature
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")          # see train.py

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from checkpoints import SHIPPED, Parser, about, check_out, find_device, run_command, say
from data import load, read_image
from decoder import Decoder
from shapes import picture_grid, to_float, to_uint8, write_png, write_safely
from unclip import BATCH, PRIORS, UnCLIP

MOST, IN_GRID = 10_000, 1_000                # pictures of one command, and in its grid.png
DEFAULT = {name: option.default for name, option in signature(Decoder.sample).parameters.items()}
# Of each task: how many pictures it makes, and the flags that it ignores.
TASKS = {"prompts": (4, ["to", "from", "fixed_noise"]),
         "reconstruct": (1, ["n", "to", "from", "fixed_noise", "prior", "eta", "show"]),
         "vary": (8, ["to", "from", "fixed_noise", "prior", "show"]),
         "interpolate": (7, ["to", "from", "prior", "eta", "show"]),
         "edit": (7, ["fixed_noise", "prior", "eta", "show"])}


def main(argv=None):
    """The command line; returns the exit status: 0 done, 2 a user's error, 130 stopped."""
    return run_command("sample.py", command, argv)


def command(argv):
    args = parse(argv)
    task, ignored = understand(args)
    check_numbers(args)
    check_out(Path(args.out))
    device = find_device(args.device)
    with about("--weights"):
        unclip = UnCLIP.load(args.weights, device)
    with about(f"--weights {args.weights}:"):
        side = unclip.part("decoder").config.image_size
        if args.prompts and args.prior not in ("text", "none"):
            unclip.part(PRIORS[args.prior or "diffusion"])
    with about(f"--{task}"):
        given = [to_float(read_image(file, side))[None].to(unclip.device) for file in args.files]
    warn(args, unclip, ignored)
    write(args, from_pictures(task, args, unclip, *given) if given else from_prompts(args, unclip))
    if args.show:
        write_steps(args, unclip)


# ---- Drawing -------------------------------------------------------------------------------------

def from_prompts(args, unclip):
    """Yield (place, picture) as pictures are drawn, the same bits as UnCLIP.generate's."""
    for tokens, rows, places in unclip.batches(args.prompts, args.n, BATCH):
        z_i = unclip.draw_z_i(tokens, args.seed, rows, args.prior or "diffusion")
        x = unclip.draw_x(z_i, tokens, args.seed, rows, **args.how)
        x = x if args.no_upsample else unclip.upsample(x, args.seed, rows)
        yield from dict(zip(places, to_uint8(x).cpu())).items()      # a place may occur twice


def from_pictures(task, args, unclip, x, x_b=None):
    """Yield (place, picture) of what the task makes of one or two pictures (1, 3, H, W)."""
    if task == "vary":
        made = unclip.vary(x, args.n, seed=args.seed, **args.how)
    elif task == "interpolate":
        made = unclip.interpolate(x, x_b, args.n, args.fixed_noise, args.seed, **args.how)
    elif task == "edit":
        made = unclip.edit(x, *args.captions, args.n, **args.how)
    else:
        made = unclip.reconstruct(x, **args.how)
        mse = F.mse_loss(to_uint8(made).float(), to_uint8(x).float())
        say(f"PSNR at {x.shape[-1]} pixels: {10 * torch.log10(255 ** 2 / mse):.1f} dB")
    # The pictures of a series share the upsampler's noise, or it would flicker. Variations do not.
    apart = task == "vary" and args.eta != 0
    for first in range(0, args.n, BATCH):
        some = made[first:first + BATCH]
        rows = [first + k if apart else 0 for k in range(len(some))]
        some = some if args.no_upsample else unclip.upsample(some, args.seed, rows)
        yield from enumerate(to_uint8(some).cpu(), first)


def write(args, drawn):
    """Write OUT/000.png … one by one, then OUT/grid.png; print the paths, and show some."""
    out, total, kept = Path(args.out), args.n * max(1, len(args.prompts)), {}
    for place, picture in tqdm(drawn, total=total, unit=" pictures", leave=False, disable=None):
        if not kept:                 # the size is known now, and no given file is written over yet
            given = [read_image(file, picture.shape[-1]) for file in args.files]
        write_png(out / f"{place:03d}.png", picture)
        if place < IN_GRID:
            kept[place] = picture
    sheet = torch.stack([*given[:1], *(kept[k] for k in sorted(kept)), *given[1:]])   # A … B
    columns = len(sheet) if given else args.n
    write_png(out / "grid.png", picture_grid(sheet, min(columns, len(sheet))))
    paths = [*(out / f"{place:03d}.png" for place in range(total)), out / "grid.png"]
    print("\n".join(map(str, paths)))
    if total > IN_GRID:
        say(f"note: grid.png shows the first {IN_GRID} of {total} pictures")
    new = {*paths, out / "steps.png"} if args.show else {*paths}
    if older := {p for p in out.glob("???*.png") if p.stem.isdecimal() or p.stem == "steps"} - new:
        say(f"note: {out} still holds pictures of an earlier run, as {min(older).name}")
    preview(sheet[:columns])


# ---- What happens on the way ---------------------------------------------------------------------

def write_steps(args, unclip):
    """Draw the first picture again, and write OUT/steps.png: what each part does for it."""
    tokens, rows, _ = next(unclip.batches(args.prompts[:1], 1, BATCH))
    z_i, moments = unclip.draw_z_i(tokens, args.seed, rows, args.prior or "diffusion"), []
    x = unclip.draw_x(z_i, tokens, args.seed, rows, **args.how, watch=lambda t, x_t, x_0:
                      moments.append((f"t = {t}", to_uint8(x_t)[0], to_uint8(x_0)[0])))
    names, x_t, x_0 = zip(*(moments[round(k * (len(moments) - 1) / 7)] for k in range(8)))
    large = x if args.no_upsample else unclip.upsample(x, args.seed, rows)
    results = [x] if large is x else [x, large]
    strips = [(f'The decoder draws "{args.prompts[0]:.60}". It starts from noise:', x_t, names),
              ("Its estimate of x_0 at these times:", x_0, names),
              ("The result:", [to_uint8(a)[0] for a in results],
               [f"{a.shape[-1]} pixels" for a in results])]
    if z_i is not None and unclip.clip.trained["data"] == "shapes":
        known = load("shapes", "train", unclip.clip.config.image_size, 2000).images
        near = torch.cat([unclip.clip.encode_image(to_float(some).to(unclip.device)) @ z_i[0]
                          for some in known.split(250)]).topk(4)
        strips.insert(0, ("Of 2,000 training pictures, these are nearest to z_i:",
                          known[near.indices.cpu()], [f"z·z_i = {dot:.2f}" for dot in near.values]))
    sheet = Image.new("RGB", (800, 152 * len(strips) + 161), "white")
    pen, y = ImageDraw.Draw(sheet), 6
    for title, pictures, names in strips:
        pen.text((4, y), title, "black", font_size=15)
        side = 256 if len(pictures) < 3 else 95
        for k, (picture, name) in enumerate(zip(pictures, names)):
            image = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST),
                        (4 + k * (side + 4), y + 22))
            pen.text((4 + k * (side + 4), y + side + 24), name, "black", font_size=13)
        y += side + 57
    path = Path(args.out) / "steps.png"
    write_safely(path, lambda temporary: sheet.save(temporary, format="png"))
    print(path)


# ---- The command ---------------------------------------------------------------------------------

def parse(argv):
    parser = Parser(prog="sample.py",
                    description="Draw pictures of prompts, or make others of given pictures.")
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help='what to draw, as "a red cube"')
    add("--n", type=int, help="pictures a prompt (default: 4; to vary 8, to interpolate or edit 7)")
    add("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    add("--guidance", type=float, metavar="S",
        help=f"1: unguided (default: {DEFAULT['guidance']}; for pictures 1)")
    add("--steps", type=int, help=f"of the decoder (default: {DEFAULT['steps']}; for pictures 50)")
    add("--eta", type=float, metavar="E",
        help=f"fresh noise, from 0 to 1, for prompts and --vary (default: {DEFAULT['eta']})")
    add("--no-upsample", action="store_true", help="stop at the decoder's size")
    add("--prior", choices=["diffusion", "ar", "text", "none"],
        help="text: z_t, on its main axes, for z_i; none: the caption alone (default: diffusion)")
    add("--weights", metavar="DIR", default=SHIPPED / "shapes",
        help="default: weights/shapes, which come with the code")
    add("--show", action="store_true", default=None,
        help="write steps.png too: how the first one came about")
    add("--out", metavar="DIR", default="samples",
        help="gets 000.png, 001.png, ..., and grid.png (default: %(default)s)")
    group = parser.add_argument_group("with pictures, instead of prompts")
    add = group.add_mutually_exclusive_group().add_argument
    add("--reconstruct", nargs=1, metavar="IMG", help="from its latents; prints the PSNR")
    add("--vary", nargs=1, metavar="IMG", help="others with the same z_i")
    add("--interpolate", nargs=2, metavar=("A", "B"), help="from one to the other")
    add("--edit", nargs=1, metavar="IMG", help="towards a caption")
    group.add_argument("--to", metavar="Y", help="that caption")
    group.add_argument("--from", metavar="Y0", help='the present one (default: "a photo")')
    group.add_argument("--fixed-noise", action="store_true", default=None,
                       help="interpolate z_i alone")
    argv = sys.argv[1:] if argv is None else [*argv]
    end = argv.index("--") if "--" in argv else len(argv)            # after it all is prompts
    args = parser.parse_intermixed_args(argv[:end])
    args.prompts += argv[end + 1:]
    return args


def understand(args):
    """Complete the arguments → the task, and the flags that were given but play no part in it."""
    tasks = [task for task in TASKS if getattr(args, task)]
    if not tasks:
        raise ValueError('nothing to draw; try: python sample.py "a red cube"')
    if len(tasks) > 1:
        raise ValueError(f'--{tasks[1]} and the prompt "{args.prompts[0]}": choose one of the two')
    task, base = tasks[0], getattr(args, "from")
    if task == "edit" and args.to is None:
        raise ValueError('--edit: say towards what, as in --to "a blue cube"')
    ignored = [key for key in TASKS[task][1] if getattr(args, key) is not None]
    vars(args).update(dict.fromkeys(ignored))
    args.n = TASKS[task][0] if args.n is None else args.n
    args.files = [] if args.prompts else getattr(args, task)
    args.captions = [args.to, "a photo" if base is None else base] if args.edit else args.prompts
    args.how = {key: value for key in ("guidance", "steps", "eta")
                if (value := getattr(args, key)) is not None}
    return task, ignored


def check_numbers(args):
    most_n = max(1, MOST // max(1, len(args.prompts)))
    for key, least, most in (("n", 2 if args.interpolate else 1, most_n), ("seed", 0, math.inf),
                             ("eta", 0, 1), ("guidance", -100, 100),
                             ("steps", 2 if args.files else 1, 1000)):    # see Diffusion.invert
        value = getattr(args, key)
        if value is not None and not least <= value <= most:              # true of nan, too
            choices = f"from {least} to {most}" if most < math.inf else f"{least} or more"
            raise ValueError(f"--{key} {value}: choose {choices}")


def warn(args, unclip, ignored):
    """Tell what the user may not mean. Refuse captions that can't be read."""
    if args.edit:
        for flag, caption in zip(("--to:", "--from:"), args.captions):
            with about(flag):
                unclip.clip.tokenizer([caption])
        unclip.text_diff(*([caption] for caption in args.captions))      # refuses equal ones
    elif args.captions:
        unclip.clip.tokenizer(args.captions)
    for caption in dict.fromkeys(args.captions):
        if unknown := unclip.clip.tokenizer.unknown_words(caption):
            say(f'note: "{caption}" has words that training never saw: {", ".join(unknown)}')
    for key in ignored:
        say(f"note: --{key.replace('_', '-')} plays no part here")
    names = {f"{place:03d}.png" for place in range(args.n)} | {"grid.png"}
    for file in map(Path, args.files):
        if file.name in names and file.resolve().parent == Path(args.out).resolve():
            say(f"note: {file} is about to be overwritten; another --out would keep it")


def preview(pictures, side=32):
    """The first of the pictures, uint8 (N, 3, H, W): in colour on a terminal, or in characters."""
    room = max(1, (shutil.get_terminal_size().columns + 1) // (side + 1))
    small = F.pad(F.adaptive_avg_pool2d(pictures[:room].float(), side), (0, 1))
    rgb = small.permute(2, 0, 3, 1).flatten(1, 2)[:, :-1].unflatten(0, (-1, 2))   # (16, 2, w, 3)
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.getenv("TERM") != "dumb":
        code = 16 + (rgb / 51).round().int() @ torch.tensor([36, 6, 1], dtype=torch.int32)
        rows = ["".join(f"\033[38;5;{a};48;5;{b}m▀" for a, b in zip(*pair)) + "\033[0m"
                for pair in code.tolist()]                           # two pixels in a character
    else:
        grey = rgb.mean(dim=(1, 3))
        grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp(min=1)
        rows = ["".join(" .:-=+*#%@"[int(9 * level)] for level in row) for row in grey.tolist()]
    print("\n".join(rows), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
