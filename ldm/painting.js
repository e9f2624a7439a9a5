// The brush of ldm/painting.py: strokes on a mask of the image's own pixels, shown in red over the image.

export class Strokes {
  constructor(height, width, painted) {
    this.height = height;
    this.width = width;
    this.mask = painted ? Uint8Array.from(painted) : new Uint8Array(height * width);
    this.before = []; // the masks that undo goes back to
  }

  begin() {
    this.before.push(this.mask.slice());
    if (this.before.length > 20) this.before.shift();
  }

  undo() {
    if (this.before.length) this.mask = this.before.pop();
  }

  clear() {
    this.begin();
    this.mask.fill(0);
  }

  // All pixels whose centre is at most `radius` from the line (x0, y0) - (x1, y1); value 1 paints, 0 erases.
  line(x0, y0, x1, y1, radius, value = 1) {
    const dx = x1 - x0, dy = y1 - y0, length = dx * dx + dy * dy;
    const from = (a, b) => Math.max(Math.floor(Math.min(a, b) - radius), 0);
    const to = (a, b, n) => Math.min(Math.ceil(Math.max(a, b) + radius), n);
    for (let i = from(y0, y1); i < to(y0, y1, this.height); i++) {
      for (let j = from(x0, x1); j < to(x0, x1, this.width); j++) {
        const x = j + 0.5, y = i + 0.5;
        const t = length ? Math.min(Math.max(((x - x0) * dx + (y - y0) * dy) / length, 0), 1) : 0;
        if (Math.hypot(x - x0 - t * dx, y - y0 - t * dy) <= radius) this.mask[i * this.width + j] = value;
      }
    }
  }
}

const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);

function render({ model, el }) {
  const [height, width] = model.get("size");
  const strokes = new Strokes(height, width, bytes(model.get("painted")));
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  canvas.style.cssText = `width: ${model.get("width")}px; touch-action: none; cursor: crosshair; display: block`;
  const bar = document.createElement("div");
  const context = canvas.getContext("2d"), image = new Image();

  function draw() {
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, width, height);
    for (let k = 0; k < strokes.mask.length; k++) {
      if (!strokes.mask[k]) continue;
      pixels.data[4 * k] = 127 + pixels.data[4 * k] / 2;
      pixels.data[4 * k + 1] /= 2;
      pixels.data[4 * k + 2] /= 2;
    }
    context.putImageData(pixels, 0, 0);
  }

  function send() {
    model.set("painted", new DataView(strokes.mask.slice().buffer));
    model.save_changes();
    draw();
  }

  function button(label, act) {
    const made = Object.assign(document.createElement("button"), { textContent: label });
    made.onclick = () => { act(); send(); };
    bar.append(made);
  }

  let last = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) * width) / box.width, ((event.clientY - box.top) * height) / box.height];
  };
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    strokes.begin();
    last = place(event);
    strokes.line(...last, ...last, model.get("brush"), event.shiftKey ? 0 : 1);
    draw();
  };
  canvas.onpointermove = (event) => {
    if (!last) return;
    const now = place(event);
    strokes.line(...last, ...now, model.get("brush"), event.shiftKey ? 0 : 1);
    last = now;
    draw();
  };
  canvas.onpointerup = () => { last = null; send(); };

  button("undo", () => strokes.undo());
  button("clear", () => strokes.clear());
  const size = Object.assign(document.createElement("input"), { type: "range", min: 1, max: Math.max(width, height) / 4, step: 0.5 });
  size.value = model.get("brush");
  size.oninput = () => { model.set("brush", Number(size.value)); model.save_changes(); };
  bar.append(" brush ", size, " shift erases");
  model.on("change:painted", () => {
    strokes.mask = Uint8Array.from(bytes(model.get("painted")));
    draw();
  });
  image.onload = draw;
  image.src = URL.createObjectURL(new Blob([model.get("picture")], { type: "image/png" }));
  el.append(bar, canvas);
}

export default { render };
