package cli

import (
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// Progress is a bar on stderr while something long runs; without a terminal it
// is nothing.
type Progress struct {
	container *mpb.Progress
	bar       *mpb.Bar
}

// NewProgress shows "label 3/12". End it with [Progress.Done].
func NewProgress(streams IO, label string, total int) *Progress {
	if _, ok := terminal(streams.Err); !ok {
		return &Progress{}
	}
	p := mpb.New(mpb.WithOutput(streams.Err), mpb.WithWidth(40))
	return &Progress{container: p, bar: p.AddBar(int64(total),
		mpb.PrependDecorators(decor.Name(label+" "), decor.CountersNoUnit("%d/%d")),
		mpb.AppendDecorators(decor.Elapsed(decor.ET_STYLE_GO)),
		mpb.BarRemoveOnComplete(),
	)}
}

// Set moves the bar; the total may grow while it runs.
func (p *Progress) Set(current, total int) {
	if p.bar == nil {
		return
	}
	p.bar.SetTotal(int64(total), false)
	p.bar.SetCurrent(int64(current))
}

// Done removes the bar and gives the terminal back.
func (p *Progress) Done() {
	if p.bar == nil {
		return
	}
	p.bar.Abort(true)
	p.container.Wait()
}
