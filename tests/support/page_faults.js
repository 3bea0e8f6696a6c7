// Return descriptions of the layout and contrast faults of the displayed page.
limits => {
  const faults = [];
  const name = element => `${element.tagName.toLowerCase()} "${(element.textContent || '').trim().slice(0, 40)}"`;
  const box = element => element.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  const overlapArea = (a, b) =>
    Math.max(0, Math.min(a.right, b.right) - Math.max(a.left, b.left)) *
    Math.max(0, Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top));
  const area = a => a.width * a.height;
  const scrollContainer = element => {
    for (let ancestor = element; ancestor && ancestor !== document.body; ancestor = ancestor.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(ancestor).overflowX)) return ancestor;
    return null;
  };

  if (document.scrollingElement.scrollWidth > window.innerWidth) faults.push('overflow: the page scrolls sideways');
  for (const element of document.body.querySelectorAll('*')) {
    const container = scrollContainer(element.parentElement);
    if (area(box(element)) && !container && (box(element).right > width + 0.5 || box(element).left < -0.5))
      faults.push(`overflow: ${name(element)}`);
  }
  for (const figure of document.querySelectorAll('figure svg')) {
    const frame = box(figure), texts = [...figure.querySelectorAll('text')].filter(text => text.textContent.trim());
    const scale = frame.width / figure.viewBox.baseVal.width;
    texts.forEach((text, number) => {
      const textBox = box(text);
      if (textBox.left < frame.left - 1 || textBox.right > frame.right + 1 || textBox.top < frame.top - 1 || textBox.bottom > frame.bottom + 1)
        faults.push(`cut off: ${name(text)}`);
      if (parseFloat(getComputedStyle(text).fontSize) * scale < limits.text) faults.push(`small text: ${name(text)}`);
      for (const other of texts.slice(number + 1))
        if (overlapArea(textBox, box(other)) > 0.12 * Math.min(area(textBox), area(box(other))))
          faults.push(`overlap: ${name(text)} and ${name(other)}`);
    });
  }
  for (const parent of document.querySelectorAll('body, header, main, section, .figures, .cards, .card, .numbers, .tokens')) {
    const children = [...parent.children].filter(child => area(box(child)) && getComputedStyle(child).float === 'none');
    children.forEach((child, number) => children.slice(number + 1).forEach(other => {
      if (overlapArea(box(child), box(other)) > 8) faults.push(`overlap: ${name(child)} and ${name(other)}`);
    }));
  }

  const channels = colour => (colour.match(/[\d.]+/g) || []).map(Number);
  const luminance = ([red, green, blue]) => [red, green, blue]
    .map(part => part / 255).map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const backgroundOf = element => {
    for (let ancestor = element; ancestor; ancestor = ancestor.parentElement) {
      const colour = channels(getComputedStyle(ancestor).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255];
  };
  const reported = new Set();
  for (const element of document.body.querySelectorAll('*')) {
    const hasText = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!hasText || !area(box(element))) continue;
    const style = getComputedStyle(element), colour = element instanceof SVGElement ? style.fill : style.color;
    const [foreground, background] = [luminance(channels(colour)), luminance(backgroundOf(element))];
    const contrast = (Math.max(foreground, background) + 0.05) / (Math.min(foreground, background) + 0.05);
    const fault = `contrast: ${contrast.toFixed(2)} of ${colour} on ${backgroundOf(element)}`;
    if (contrast < limits.contrast && !reported.has(fault)) { reported.add(fault); faults.push(`${fault}, ${name(element)}`); }
  }
  return faults;
}
