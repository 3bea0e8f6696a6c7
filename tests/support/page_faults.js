// Faults of the page that is shown, in words.
limits => {
  const found = [];
  const name = element => `${element.tagName.toLowerCase()} "${(element.textContent || '').trim().slice(0, 40)}"`;
  const box = element => element.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  const shared = (a, b) =>
    Math.max(0, Math.min(a.right, b.right) - Math.max(a.left, b.left)) *
    Math.max(0, Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top));
  const area = a => a.width * a.height;
  const scrolls = element => {
    for (let up = element; up && up !== document.body; up = up.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(up).overflowX)) return up;
    return null;
  };

  if (document.scrollingElement.scrollWidth > window.innerWidth) found.push('overflow: the page scrolls sideways');
  for (const element of document.body.querySelectorAll('*')) {
    const container = scrolls(element.parentElement);
    if (area(box(element)) && !container && (box(element).right > width + 0.5 || box(element).left < -0.5))
      found.push(`overflow: ${name(element)}`);
  }
  for (const drawing of document.querySelectorAll('figure svg')) {
    const frame = box(drawing), texts = [...drawing.querySelectorAll('text')].filter(text => text.textContent.trim());
    const scale = frame.width / drawing.viewBox.baseVal.width;
    texts.forEach((text, number) => {
      const own = box(text);
      if (own.left < frame.left - 1 || own.right > frame.right + 1 || own.top < frame.top - 1 || own.bottom > frame.bottom + 1)
        found.push(`cut off: ${name(text)}`);
      if (parseFloat(getComputedStyle(text).fontSize) * scale < limits.text) found.push(`small text: ${name(text)}`);
      for (const other of texts.slice(number + 1))
        if (shared(own, box(other)) > 0.12 * Math.min(area(own), area(box(other))))
          found.push(`overlap: ${name(text)} and ${name(other)}`);
    });
  }
  for (const parent of document.querySelectorAll('body, header, main, section, .figures, .cards, .card, .numbers, .tokens')) {
    const children = [...parent.children].filter(child => area(box(child)) && getComputedStyle(child).float === 'none');
    children.forEach((child, number) => children.slice(number + 1).forEach(other => {
      if (shared(box(child), box(other)) > 8) found.push(`overlap: ${name(child)} and ${name(other)}`);
    }));
  }

  const channels = colour => (colour.match(/[\d.]+/g) || []).map(Number);
  const luminance = ([red, green, blue]) => [red, green, blue]
    .map(part => part / 255).map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const paper = element => {
    for (let up = element; up; up = up.parentElement) {
      const colour = channels(getComputedStyle(up).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255];
  };
  const seen = new Set();
  for (const element of document.body.querySelectorAll('*')) {
    const says = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!says || !area(box(element))) continue;
    const style = getComputedStyle(element), colour = element instanceof SVGElement ? style.fill : style.color;
    const [one, other] = [luminance(channels(colour)), luminance(paper(element))];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    const fault = `contrast: ${contrast.toFixed(2)} of ${colour} on ${paper(element)}`;
    if (contrast < limits.contrast && !seen.has(fault)) { seen.add(fault); found.push(`${fault}, ${name(element)}`); }
  }
  return found;
}
