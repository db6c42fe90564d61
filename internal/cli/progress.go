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
	return newProgress(streams, label, int64(total), decor.CountersNoUnit("%d/%d"))
}

// NewProgressBytes shows "label 3.0 MiB/12.0 MiB". End it with [Progress.Done].
func NewProgressBytes(streams IO, label string) *Progress {
	return newProgress(streams, label, 0, decor.CountersKibiByte("% .1f/% .1f"))
}

func newProgress(streams IO, label string, total int64, counters decor.Decorator) *Progress {
	if _, ok := terminal(streams.Err); !ok {
		return &Progress{}
	}
	p := mpb.New(mpb.WithOutput(streams.Err), mpb.WithWidth(40))
	bar := p.AddBar(0, // of a bar that has a total from the start it could not be changed
		mpb.PrependDecorators(decor.Name(label+" "), counters),
		mpb.AppendDecorators(decor.Elapsed(decor.ET_STYLE_GO)),
		mpb.BarRemoveOnComplete(),
	)
	bar.SetTotal(total, false)
	return &Progress{container: p, bar: bar}
}

// Set moves the bar; the total may grow while it runs.
func (p *Progress) Set(current, total int) { p.SetBytes(int64(current), int64(total)) }

// SetBytes is [Progress.Set] with more room.
func (p *Progress) SetBytes(current, total int64) {
	if p.bar == nil {
		return
	}
	p.bar.SetTotal(total, false)
	p.bar.SetCurrent(current)
}

// Done removes the bar and gives the terminal back.
func (p *Progress) Done() {
	if p.bar == nil {
		return
	}
	p.bar.Abort(true)
	p.container.Wait()
}
