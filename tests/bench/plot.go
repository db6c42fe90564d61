package main

import (
	"cmp"
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// Sizes and colours of the plot, in pixels.
const (
	plotWidth  = 960
	labelWidth = 400
	valueWidth = 200
	barHeight  = 16
	barStep    = 26
	plotTop    = 64
	mostTimes  = 4.0 // bars end there: further is only better
	panelHigh  = 200
	panelGap   = 70
	colourMiss = "#c2410c"
	colourMet  = "#0f766e"
	colourInk  = "#1f2937"
	colourSoft = "#6b7280"
	colourGrid = "#e5e7eb"
)

// canvas collects SVG elements.
type canvas struct{ strings.Builder }

func (c *canvas) rect(x, y, w, h float64, fill string) {
	fmt.Fprintf(c, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" rx="2" fill="%s"/>`+"\n", x, y, w, h, fill)
}

func (c *canvas) line(x1, y1, x2, y2 float64, stroke, dash string) {
	fmt.Fprintf(c, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-dasharray="%s"/>`+"\n", x1, y1, x2, y2, stroke, dash)
}

func (c *canvas) text(x, y float64, anchor, fill string, size int, s string) {
	fmt.Fprintf(c, `<text x="%.1f" y="%.1f" text-anchor="%s" fill="%s" font-size="%d">%s</text>`+"\n", x, y, anchor, fill, size, html.EscapeString(s))
}

// plot draws how far each figure is from its goal, and below what grows with
// the number of nodes.
func (r results) plot() string {
	var bars []figure
	for _, f := range figures {
		if _, ok := r.Figures[f.id]; ok && f.judged() && !f.exact {
			bars = append(bars, f)
		}
	}
	high := float64(plotTop + len(bars)*barStep + 40)
	panels := r.panels()
	total := high
	if len(panels) > 0 {
		total += panelHigh + panelGap + 40
	}
	var c canvas
	fmt.Fprintf(&c, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %.0f" font-family="system-ui, sans-serif" role="img">`+"\n", plotWidth, total)
	c.WriteString("<title>Sallyport against its goals</title>\n")
	c.rect(0, 0, plotWidth, total, "#ffffff")
	c.text(24, 28, "start", colourInk, 17, "Times as good as the goal")
	c.text(24, 46, "start", colourSoft, 12, "logarithmic; the line is the goal (must), the tick further right the stretch")
	r.bars(&c, bars)
	for i, p := range panels {
		wide := float64(plotWidth-48) / float64(len(panels))
		p.draw(&c, 24+float64(i)*wide, high+30, wide-24)
	}
	c.WriteString("</svg>\n")
	return c.String()
}

// along maps times-as-good to x: from 1/mostTimes to mostTimes, logarithmic.
func along(times float64) float64 {
	t := min(max(times, 1/mostTimes), mostTimes)
	wide := float64(plotWidth - labelWidth - valueWidth)
	return labelWidth + wide*(math.Log(t)/math.Log(mostTimes)+1)/2
}

func (r results) bars(c *canvas, bars []figure) {
	bottom := float64(plotTop + len(bars)*barStep)
	for _, t := range []float64{0.25, 0.5, 1, 2, 4} {
		colour := colourGrid
		if t == 1 {
			colour = colourInk
		}
		c.line(along(t), plotTop-6, along(t), bottom, colour, "")
		c.text(along(t), bottom+16, "middle", colourSoft, 11, digits(t)+"×")
	}
	for i, f := range bars {
		y := float64(plotTop + i*barStep)
		v := r.Figures[f.id].value()
		colour := colourMet
		if f.verdict(v) == verdictMissed {
			colour = colourMiss
		}
		c.text(labelWidth-12, y+12, "end", colourInk, 12, f.row+": "+f.name)
		from, to := along(1), along(f.achieved(v))
		c.rect(min(from, to), y, max(math.Abs(to-from), 1.5), barHeight, colour)
		if f.stretch != 0 {
			x := along(f.achieved(f.stretch))
			c.line(x, y-2, x, y+barHeight+2, colourInk, "2 2")
		}
		c.text(plotWidth-valueWidth+12, y+12, "start", colour, 12, amount(v, f.unit))
		c.text(plotWidth-24, y+12, "end", colourSoft, 11, f.limit(f.must))
	}
}

// panel is one line over the number of nodes.
type panel struct {
	name, unit string
	points     [][2]float64 // nodes, value
}

func (r results) panels() []panel {
	points := slices.SortedFunc(slices.Values(r.Scale), func(a, b scalePoint) int { return cmp.Compare(a.Nodes, b.Nodes) })
	all := []panel{
		{name: "RCP memory per node (anonymous)", unit: unitKiB, points: series(points, func(p scalePoint) float64 { return p.Anonymous })},
		{name: "All connected again", unit: unitSecond, points: series(points, func(p scalePoint) float64 { return p.Reconnect })},
		{name: "Desired state to all", unit: unitSecond, points: series(points, func(p scalePoint) float64 { return p.Desired })},
	}
	return slices.DeleteFunc(all, func(p panel) bool { return len(p.points) < 2 })
}

// series takes the points of one RCP where a value was measured.
func series(points []scalePoint, value func(scalePoint) float64) [][2]float64 {
	var out [][2]float64
	for _, p := range points {
		if v := value(p); v >= 0 && p.RCPs == 1 {
			out = append(out, [2]float64{float64(p.Nodes), v})
		}
	}
	return out
}

func (p panel) draw(c *canvas, x, y, wide float64) {
	mostX, mostY := 0.0, 0.0
	for _, q := range p.points {
		mostX, mostY = max(mostX, q[0]), max(mostY, q[1])
	}
	if mostY == 0 {
		mostY = 1
	}
	c.text(x, y, "start", colourInk, 14, p.name)
	top, bottom := y+24, y+panelHigh
	at := func(q [2]float64) (float64, float64) {
		return x + q[0]/mostX*(wide-24), bottom - q[1]/(mostY*1.15)*(bottom-top)
	}
	c.line(x, bottom, x+wide, bottom, colourInk, "")
	c.line(x, top, x, bottom, colourGrid, "")
	path := make([]string, len(p.points))
	for i, q := range p.points {
		px, py := at(q)
		path[i] = fmt.Sprintf("%.1f,%.1f", px, py)
	}
	fmt.Fprintf(c, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(path, " "), colourMet)
	for _, q := range p.points {
		px, py := at(q)
		fmt.Fprintf(c, `<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>`+"\n", px, py, colourMet)
		c.text(px, py-9, "middle", colourInk, 11, amount(q[1], p.unit))
		c.text(px, bottom+16, "middle", colourSoft, 11, thousands(fmt.Sprintf("%.0f", q[0])))
	}
	c.text(x+wide, bottom+32, "end", colourSoft, 11, "nodes on one RCP")
}
