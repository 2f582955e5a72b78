// Numbers and lengths as text, and the scale bar.

/** A length in micrometres with at most 3 significant digits of a handy unit. */
export const length = (um) => (um >= 10000 ? `${tidy(um / 1000)} mm` : `${tidy(um)} µm`);

/** An area in square millimetres. */
export const area = (mm2) => {
  if (mm2 === null) return "–";
  const digits = mm2 >= 100 ? 0 : mm2 >= 10 ? 1 : mm2 >= 1 ? 2 : 3;
  return `${mm2.toFixed(digits)} mm²`;
};

export const percent = (value) => (value === null ? "–" : `${value.toFixed(1)} %`);

/** Whole numbers with thin spaces between thousands. */
export const whole = (value) => Math.floor(value).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");

/** The longest of 1, 2, 5 times a power of ten that fits. */
export const roundLength = (longest) => {
  const power = 10 ** Math.floor(Math.log10(longest));
  return [5, 2, 1].map((step) => step * power).find((value) => value <= longest);
};

const tidy = (value) => String(Number(value.toPrecision(3)));
