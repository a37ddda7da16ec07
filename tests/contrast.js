// For every text that is seen: the contrast of its colour with what is painted behind it, as the
// browser blends the two (WCAG 2), the text, and its element's class.
() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const blend = (layers) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const [colour, alpha] of layers) {
      canvas.globalAlpha = alpha;
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement)
      layers.unshift([getComputedStyle(e).backgroundColor, 1]);
    return layers;
  };

  for (const details of document.querySelectorAll("details")) details.open = true;
  // Cells of a heat map lie under its numbers.
  const cells = [...document.querySelectorAll("svg path[fill-opacity]")].map((path) => {
    const { fill, fillOpacity } = getComputedStyle(path);
    return [path.getBoundingClientRect(), fill, Number(fillOpacity)];
  });
  const cellsUnder = (element) => {
    const box = element.getBoundingClientRect();
    const x = (box.left + box.right) / 2, y = (box.top + box.bottom) / 2;
    const holds = (cell) => cell.left < x && x < cell.right && cell.top < y && y < cell.bottom;
    return cells.filter(([cell]) => holds(cell)).map(([, fill, opacity]) => [fill, opacity]);
  };

  const found = [];
  const add = (element, text, colour, layers) =>
    found.push([ratio(blend([...layers, [colour, 1]]), blend(layers)), text, element.className]);
  const isSeen = (element) =>
    element.checkVisibility() && !element.closest("script, style, title, desc, button:disabled");
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !isSeen(element)) continue;
    const { color, fill } = getComputedStyle(element);
    if (element.tagName === "text")
      add(element, text, fill, [...behind(element), ...cellsUnder(element)]);
    else add(element, text, color, behind(element));
  }
  for (const bar of document.querySelectorAll(".bar[data-label]"))
    add(bar, bar.dataset.label, getComputedStyle(bar).color, behind(bar));
  return found;
}
