"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  const facts = JSON.parse($("facts").textContent);
  const { image, layers, organs, supports, why } = facts;
  const AXIAL = 0, CORONAL = 1, SAGITTAL = 2, RENDER = 4;
  const hidden = new Set(); // ranks of the organs that are hidden; organ i has rank i + 1
  let here = image.shape.map((n) => n >> 1); // voxel z, y, x of the whole scan, in display order
  let because = null; // the boxes that the marks show

  // Strings become text nodes, so no name is parsed as HTML.
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name in element) element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };
  const swatch = (rank) => {
    const box = make("span", { className: "swatch", ariaHidden: "true" });
    if (rank) box.style.background = organs[rank - 1].colour;
    return box;
  };
  const span = (count) => `0–${count - 1}`; // numbered as in NumPy and the reports
  const called = (rank) => (rank ? organs[rank - 1].name : "background");
  const radios = (parent, name, choices, choose) => {
    choices.forEach(([text, title = ""], i) => {
      const input = make("input", { type: "radio", name, checked: i === 0 });
      input.addEventListener("change", () => choose(i));
      parent.append(make("label", { title }, input, text));
    });
  };

  // --- geometry: voxels of the whole scan, of the thinned one, and NiiVue's fractions --------
  // Stored x points to the patient's left and y to the back; fractions to the right and front.
  const kept = (volume, axis) => {
    const [n, step] = [volume.shape[axis], volume.step[axis]];
    const first = Math.min(step >> 1, n - 1);
    return { first, step, count: Math.ceil((n - first) / step), n };
  };
  const toFraction = (volume, voxel) =>
    [2, 1, 0].map((axis) => {
      const { first, step, count } = kept(volume, axis);
      const part = ((voxel[axis] - first) / step + 0.5) / count;
      return axis ? 1 - part : part;
    });
  const fromFraction = (volume, fraction) =>
    [0, 1, 2].map((axis) => {
      const { first, step, count, n } = kept(volume, axis);
      const part = axis ? 1 - fraction[2 - axis] : fraction[2 - axis];
      const at = Math.min(Math.max(Math.floor(part * count), 0), count - 1);
      return Math.min(first + at * step, n - 1);
    });

  // --- panes ---------------------------------------------------------------------------------
  const colours = () => {
    const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: [""] };
    organs.forEach((organ, i) => {
      const rgb = parseInt(organ.colour.slice(1), 16);
      const entry = { R: rgb >> 16, G: (rgb >> 8) & 255, B: rgb & 255, A: hidden.has(i + 1) ? 0 : 255, I: i + 1, labels: "" };
      for (const [name, value] of Object.entries(entry)) table[name].push(value);
    });
    return table;
  };

  class Pane {
    constructor(figure) {
      this.figure = figure;
      this.canvas = figure.querySelector("canvas");
      this.svg = figure.querySelector("svg");
      this.nv = new niivue.Niivue({
        isRadiologicalConvention: true,
        dragAndDropEnabled: false,
        backColor: [0, 0, 0, 1],
        crosshairColor: [0.45, 0.75, 1, 0.8],
        crosshairWidthUnit: "mm",
        crosshairGap: 6,
        fontColor: [0.75, 0.78, 0.82, 1],
        fontMinPx: 12,
        show3Dcrosshair: false,
        isNearestInterpolation: false,
        loadingText: "",
        logLevel: "error",
      });
      // NiiVue draws whenever a property is set; once per frame is enough.
      const draw = this.nv.drawScene.bind(this.nv);
      let due = false;
      this.nv.drawScene = () => {
        if (due) return;
        due = true;
        requestAnimationFrame(() => {
          due = false;
          if (!this.volume) return;
          draw();
          this.mark();
        });
      };
      this.nv.onLocationChange = (where) => {
        if (this.volume === image && !this.moving) move(fromFraction(image, where.frac), this);
      };
      this.canvas.addEventListener("keydown", keys, true);
    }

    async show(name, volume, imageBlock, labelBlock) {
      [this.name, this.volume] = [name, volume];
      this.canvas.setAttribute("aria-label", `Views of ${name}; arrow keys move through them`);
      while (this.nv.volumes.length) this.nv.removeVolume(this.nv.volumes[0]);
      const load = (block) =>
        niivue.NVImage.loadFromBase64({ base64: $(block).textContent, name: `${block}.nii.gz`, colormap: "gray" });
      this.nv.addVolume(await load(imageBlock));
      if (labelBlock) {
        const labels = await load(labelBlock);
        labels.setColormapLabel(colours());
        this.nv.addVolume(labels);
        this.nv.setOpacity(1, $("opacity").value / 100);
      }
      // The support shows the matched slice: it follows the query and cannot be moved.
      this.nv.setCrosshairWidth(volume === image ? 1 : 0);
      this.canvas.style.pointerEvents = volume === image ? "" : "none";
      this.window(volume.windows[Math.min(chosenWindow, volume.windows.length - 1)]);
      this.layout();
    }

    window([, low, high]) {
      [this.nv.volumes[0].cal_min, this.nv.volumes[0].cal_max] = [low, high];
      this.nv.updateGLVolume();
    }

    paint() {
      if (this.nv.volumes.length < 2) return;
      this.nv.volumes[1].setColormapLabel(colours());
      this.nv.updateGLVolume();
    }

    layout() {
      const only = this.volume === image ? chosenLayout : AXIAL;
      this.nv.clearCustomLayout();
      if (only !== null) {
        this.nv.setSliceType(only);
        return;
      }
      // A large axial view, and the three others below it or to its right.
      const { width, height } = this.canvas.getBoundingClientRect();
      const large = 0.66, small = 1 - large;
      this.nv.setCustomLayout([AXIAL, CORONAL, SAGITTAL, RENDER].map((sliceType, i) => {
        const wide = i ? [large, (i - 1) / 3, small, 1 / 3] : [0, 0, large, 1];
        const high = i ? [(i - 1) / 3, large, 1 / 3, small] : [0, 0, 1, large];
        return { sliceType, position: width > height ? wide : high };
      }));
    }

    go(voxel) {
      this.moving = true;
      this.nv.scene.crosshairPos = toFraction(this.volume, voxel);
      this.nv.drawScene();
      this.moving = false;
    }

    // Draws the boxes of `because` on the axial view: [y0, y1, x0, x1] in voxels of the scan.
    mark() {
      this.svg.replaceChildren();
      if (!because || !this.volume) return;
      const ratio = this.nv.uiData.dpr || 1;
      const z = this.nv.scene.crosshairPos[2];
      for (const [box, kind] of because[this.volume === image ? "query" : "support"]) {
        const corners = [[box[0], box[2]], [box[1], box[3]]].map(([y, x]) => {
          const [fx, fy] = toFraction(this.volume, [0, y - 0.5, x - 0.5]);
          const at = this.nv.frac2canvasPosWithTile([fx, fy, z], AXIAL);
          return at && at.pos.map((v) => v / ratio);
        });
        if (corners.includes(null)) continue;
        const [a, b] = corners;
        const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
        const set = { x: Math.min(a[0], b[0]), y: Math.min(a[1], b[1]), width: Math.abs(a[0] - b[0]), height: Math.abs(a[1] - b[1]), class: `mark ${kind}` };
        for (const [name, value] of Object.entries(set)) rect.setAttribute(name, value);
        this.svg.append(rect);
      }
    }
  }

  // --- position ------------------------------------------------------------------------------
  const sliders = ["Axial", "Coronal", "Sagittal"].map((name, axis) => {
    const input = make("input", { type: "range", min: 0, max: image.shape[axis] - 1, step: image.step[axis] });
    const output = make("output");
    input.addEventListener("input", () => {
      const to = [...here];
      to[axis] = Number(input.value);
      move(to);
    });
    $("position").append(make("label", {}, name, input, output));
    return { input, output };
  });

  function keys(event) {
    const [axis, by] = { ArrowUp: [0, 1], ArrowDown: [0, -1], PageUp: [0, 1], PageDown: [0, -1], ArrowLeft: [2, -1], ArrowRight: [2, 1] }[event.key] || [];
    if (axis === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    const to = [...here];
    to[axis] = Math.min(Math.max(to[axis] + by * image.step[axis], 0), image.shape[axis] - 1);
    move(to);
  }

  function move(to, from = null) {
    here = to;
    sliders.forEach(({ input, output }, axis) => {
      input.value = to[axis];
      output.value = `${to[axis]} of ${span(image.shape[axis])}`;
    });
    explain();
    for (const pane of panes) {
      if (pane === from) pane.mark();
      else if (pane.volume === image) pane.go(to);
      else if (pane.volume) follow(pane);
    }
    captions();
    say();
  }

  // Goes to the support's slice that matches the query's.
  function follow(pane) {
    const slice = pane.volume.match[here[0]];
    pane.figure.querySelector(".stage p")?.remove();
    if (slice < 0) {
      const text = `Slice ${here[0]} is beyond the range of ${pane.volume.name}: it has no match there.`;
      pane.figure.querySelector(".stage").append(make("p", {}, text));
    } else pane.go([slice, pane.volume.shape[1] >> 1, pane.volume.shape[2] >> 1]);
  }

  function captions() {
    for (const pane of panes) {
      const support = pane.volume && pane.volume !== image;
      const slice = support ? pane.volume.match[here[0]] : here[0];
      const where = `slice ${slice} of ${span(pane.volume ? pane.volume.shape[0] : 1)}`;
      const text = support ? (slice < 0 ? " no slice matched" : ` matched ${where}`) : ` ${where}`;
      const caption = pane.figure.querySelector("figcaption");
      caption.replaceChildren(make("b", {}, pane.name || ""), text);
      caption.title = caption.textContent;
    }
  }

  function say() {
    const [scan] = panes[0].nv.volumes;
    const mm = panes[0].nv.frac2mm(toFraction(image, here), 0, true);
    const value = (volume) => volume.getValue(...volume.mm2vox([mm[0], mm[1], mm[2]]));
    const parts = [];
    if (scan) parts.push(`${Number((value(scan) - image.offset).toPrecision(4))} ${image.unit}`.trim());
    for (const pane of panes) {
      if (pane.volume === image && pane.nv.volumes.length > 1) parts.push(`${pane.name}: ${called(value(pane.nv.volumes[1]))}`);
    }
    $("here").textContent = parts.join("  ·  ");
  }

  // --- why -----------------------------------------------------------------------------------
  let reasons = null;
  async function unpackWhy() {
    const bytes = Uint8Array.from(atob($("why-data").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const raw = await new Response(stream).arrayBuffer();
    const count = why.shape.reduce((a, b) => a * b, 1);
    reasons = {
      windows: new Int32Array(raw, 0, count),
      cosines: new Int16Array(raw, 4 * count, count),
      ranks: new Uint8Array(raw, 6 * count, count),
    };
  }

  function explain() {
    because = null;
    if (!reasons) return;
    const [z, y, x] = here;
    const [, ranks, h, w] = why.shape;
    const index = why.slices.indexOf(z);
    const instead = (text) => $("because").replaceChildren(make("p", {}, text));
    if (index < 0) return instead("No organ was searched for in this slice, since its match shows none.");
    const [y0, y1, x0, x1] = why.query_boxes[index];
    const row = Math.floor(((y + 0.5 - y0) / (y1 - y0)) * h);
    const column = Math.floor(((x + 0.5 - x0) / (x1 - x0)) * w);
    if (row < 0 || row >= h || column < 0 || column >= w) return instead("This point is outside the body’s bounding box; only the box was compared.");
    const within = ([a, b, c, d], [top, bottom], [left, right]) =>
      [a + top * (b - a), a + bottom * (b - a), c + left * (d - c), c + right * (d - c)];
    because = { query: [[within(why.query_boxes[index], [row / h, (row + 1) / h], [column / w, (column + 1) / w]), "cell"]], support: [] };
    const [items, cosines] = [[], []];
    for (let r = 0; r < ranks; r++) {
      const i = ((index * ranks + r) * h + row) * w + column;
      const rank = reasons.ranks[i];
      if (rank === 255) continue;
      const cosine = reasons.cosines[i] / 10000;
      cosines.push([called(rank), cosine]);
      let text = "not labelled in any window over this point";
      if (reasons.windows[i] >= 0) {
        const [Gy, Gx] = [why.rows.length, why.columns.length];
        const [gy, gx] = [Math.floor(reasons.windows[i] / Gx) % Gy, reasons.windows[i] % Gx];
        const source = why.sources[index][Math.floor(reasons.windows[i] / (Gy * Gx))];
        const from = source.map(([support, first, centre, last]) =>
          `${supports[support]?.name ?? `support ${support + 1}`}, slice${first < last ? `s ${first} to ${last}, matched ${centre}` : ` ${centre}`}`);
        text = `window in row ${gy + 1}, column ${gx + 1}, of ${from.join(" and ")}`;
        if (r < 2) {
          const kind = r ? "second" : "first";
          because.query.push([within(why.query_boxes[index], why.rows[gy], why.columns[gx]), kind]);
          for (const [support, , centre] of source) {
            if (panes[1]?.volume === supports[support]) {
              because.support.push([within(why.support_boxes[support][centre], why.rows[gy], why.columns[gx]), kind]);
            }
          }
        }
      }
      items.push(make("li", {}, swatch(rank), make("strong", {}, called(rank)), make("span", {}, cosine.toFixed(3)),
        make("meter", { min: 0, max: 1, value: Math.max(cosine, 0), ariaHidden: "true" }), make("span", { className: "quiet" }, text)));
    }
    const summary = cosines.length > 1
      ? `${cosines[0][0]}, ${(cosines[0][1] - cosines[1][1]).toFixed(3)} ahead of ${cosines[1][0]}`
      : `only ${cosines[0][0]}`;
    $("because").replaceChildren(
      make("p", {}, summary),
      make("ol", {}, ...items),
      make("p", { className: "quiet" }, `Cosine of the features here with each class’s prototype in its best window. Solid: the winner’s window; dashed: the runner-up’s. Compared at ${h} × ${w} cells, so borders may be off by a cell.`),
    );
  }

  // --- organs --------------------------------------------------------------------------------
  function organTable() {
    const dice = organs.some((organ) => organ.dice !== null);
    const sure = organs.some((organ) => organ.confidence !== null);
    const heads = layers.map((name) => (layers.length > 1 ? `${name}, ml` : "ml"));
    if (dice) heads.push("Dice");
    if (sure) heads.push("confidence");
    const table = $("organs");
    table.append(make("thead", {}, make("tr", {}, ...["organ", ...heads].map((text) => make("th", { scope: "col" }, text)))));
    const body = make("tbody");
    organs.forEach((organ, i) => {
      const box = make("input", { type: "checkbox", checked: true, ariaLabel: `show ${organ.name}` });
      box.addEventListener("change", () => {
        if (box.checked) hidden.delete(i + 1);
        else hidden.add(i + 1);
        panes.forEach((pane) => pane.paint());
      });
      const jump = make("button", { type: "button", className: "jump", disabled: !organ.at, title: organ.at ? "go to this organ" : "not found" }, organ.name);
      jump.addEventListener("click", () => move(organ.at));
      const cells = organ.ml.map((ml) => (ml ? ml.toFixed(ml < 10 ? 1 : 0) : "–"));
      if (dice) cells.push(organ.dice === null ? "–" : organ.dice.toFixed(2));
      if (sure) cells.push(organ.confidence === null ? "–" : `${Math.round(100 * organ.confidence)} %`);
      body.append(make("tr", { className: organ.ml.some((ml) => ml) ? "" : "absent" },
        make("th", { scope: "row" }, make("div", {}, box, swatch(i + 1), jump)), ...cells.map((text) => make("td", {}, text))));
    });
    table.append(body);
    const every = (on) => () => {
      hidden.clear();
      organs.forEach((_, i) => on || hidden.add(i + 1));
      body.querySelectorAll("input").forEach((box) => (box.checked = on));
      panes.forEach((pane) => pane.paint());
    };
    $("all").addEventListener("click", every(true));
    $("none").addEventListener("click", every(false));
  }

  // --- assembly ------------------------------------------------------------------------------
  const times = (list) => [...list].reverse().map((v) => Number(v.toFixed(2))).join(" × ");
  $("title").textContent = facts.title;
  $("about").textContent = `${times(image.shape)} voxels of ${times(image.spacing)} mm`;
  $("notes").append(...facts.notes.map((note) => make("li", {}, note)));
  organTable();
  if (!organs.length) $("organs").closest("section").hidden = true;

  let chosenLayout = null, chosenWindow = 0;
  const panes = [];
  if (!document.createElement("canvas").getContext("webgl2")) {
    $("panes").replaceChildren(make("p", {}, "This browser has no WebGL 2, so the scan cannot be drawn. The table of organs is complete."));
    document.querySelectorAll(".bar, .row, #position, #position + p").forEach((part) => (part.hidden = true));
    document.querySelectorAll("#organs input, #organs button").forEach((part) => (part.disabled = true));
    document.body.dataset.ready = "without views";
    return;
  }
  const besides = [
    ["nothing", null],
    ...layers.slice(1).map((name, i) => [name, () => [name, image, "image", `layer-${i + 1}`]]),
    ...supports.map((support, i) => [`support ${support.name}`, () => [`support ${support.name}`, support, `support-${i}`, `support-${i}-labels`]]),
  ];
  radios($("layout"), "layout", [["All"], ["Axial"], ["Coronal"], ["Sagittal"], ["3-D"]], (i) => {
    chosenLayout = [null, AXIAL, CORONAL, SAGITTAL, RENDER][i];
    panes.forEach((pane) => pane.layout());
    move(here);
  });
  radios($("windows"), "window", image.windows.map(([name, low, high]) => [name, `${Math.round(low - image.offset)} to ${Math.round(high - image.offset)} ${image.unit}`]), (i) => {
    chosenWindow = i;
    panes.forEach((pane) => pane.volume && pane.window(pane.volume.windows[Math.min(i, pane.volume.windows.length - 1)]));
  });
  besides.forEach(([name], i) => $("beside").append(make("option", { value: i }, name)));
  $("beside-choice").hidden = besides.length < 2;
  // One after the other, since the previous choice may still be loading.
  let turn = Promise.resolve();
  const beside = () => (turn = turn.then(async () => {
    const choice = besides[$("beside").value][1];
    $("right").hidden = !choice;
    panes[1]?.figure.querySelector(".stage p")?.remove();
    panes.length = 1;
    if (choice) {
      if (!right) {
        right = new Pane($("right"));
        await right.nv.attachToCanvas(right.canvas);
      }
      await right.show(...choice());
      outline(right);
      panes[1] = right;
    }
    panes.forEach((pane) => pane.nv.resizeListener());
    panes.forEach((pane) => pane.layout());
    move(here);
  }));
  $("beside").addEventListener("change", beside);
  const outline = (pane) => pane.nv.setAtlasOutline($("outline").checked ? 1 : 0);
  $("outline").addEventListener("change", () => panes.forEach(outline));
  $("opacity").addEventListener("input", () => panes.forEach((pane) => pane.nv.volumes.length > 1 && pane.nv.setOpacity(1, $("opacity").value / 100)));

  let right = null;
  const left = new Pane($("left"));
  panes.push(left);
  await left.nv.attachToCanvas(left.canvas);
  await left.show(layers[0] ?? facts.title, image, "image", layers.length ? "layer-0" : null);
  if (why) {
    await unpackWhy();
    $("why").hidden = false;
  }
  const largest = organs.filter((organ) => organ.at).sort((a, b) => b.ml[0] - a.ml[0])[0];
  move(largest ? largest.at : here);
  if (besides.length > 1) {
    $("beside").value = supports.length ? besides.length - supports.length : 1;
    await beside();
  }
  document.body.dataset.ready = "yes";
  window.lslpn = { panes, where: () => here };
})().catch((error) => {
  document.getElementById("here").textContent = `The scan cannot be drawn: ${error.message}`;
  throw error;
});
