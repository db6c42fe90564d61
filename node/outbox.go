package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"sallyport/internal/channel"
	"sallyport/internal/wire"
	"sallyport/node/spool"
)

// watermarkWithin is how long a gateway may take to look up a spool.
const watermarkWithin = time.Minute

var errOutboxEnd = errors.New("the gateway ended the outbox")

// outbox serves POST /v1/outbox: events up, acknowledgements down, until the
// gateway ends its side or opens another.
func (in *instance) outbox(w http.ResponseWriter, r *http.Request) {
	in.outboxes.Add(1)
	err := in.pumpOutbox(w, r)
	in.outboxes.Add(-1)
	in.log.Debug("outbox ended", "reason", err)
	if st, serr := in.spool.State(); serr == nil && st.Depth > 0 {
		in.signals.kick() // what came after the gateway looked away
	}
	in.signals.wake()
}

func (in *instance) pumpOutbox(w http.ResponseWriter, r *http.Request) error {
	ctl := http.NewResponseController(w)
	send := func(lines ...wire.OutboxUp) error {
		var buf []byte
		var err error
		for _, l := range lines {
			if buf, err = wire.AppendLine(buf, l); err != nil {
				return err
			}
		}
		if _, err := w.Write(buf); err != nil {
			return err
		}
		return ctl.Flush()
	}
	st, err := in.spool.State()
	if err != nil {
		channel.Refuse(w, http.StatusServiceUnavailable, err.Error())
		return err
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	if err := send(wire.OutboxUp{State: &st}); err != nil {
		return err
	}
	down := wire.NewLineReader(r.Body, wire.MaxFrameLine)
	late := time.AfterFunc(watermarkWithin, func() { _ = r.Body.Close() })
	var first wire.OutboxDown
	err = down.Next(&first)
	late.Stop()
	if err != nil {
		return fmt.Errorf("read watermark: %w", err)
	}
	if first.Watermark == nil {
		return fmt.Errorf("%w: the gateway's first line is no watermark", spool.ErrMark)
	}
	reader, renewed, err := in.spool.Reader(*first.Watermark)
	if err != nil {
		return err
	}
	defer reader.Close()
	if renewed {
		if st, err = in.spool.State(); err != nil {
			return err
		}
		if err := send(wire.OutboxUp{State: &st}); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	acked := make(chan struct{})
	go func() { // ends with the body
		defer close(acked)
		cancel(takeAcks(down, reader))
	}()
	defer func() { _ = r.Body.Close(); <-acked }()
	for {
		lines, err := reader.Next(ctx)
		if errors.Is(err, errOutboxEnd) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := send(lines...); err != nil {
			return err
		}
	}
}

// takeAcks reads the gateway's side to its end.
func takeAcks(down *wire.LineReader, reader *spool.Reader) error {
	for {
		var l wire.OutboxDown
		err := down.Next(&l)
		if errors.Is(err, io.EOF) {
			return errOutboxEnd
		}
		if err != nil {
			return fmt.Errorf("read acknowledgement: %w", err)
		}
		mark := l.Ack
		if mark == nil {
			mark = l.Watermark // of the spool that the first watermark made us start
		}
		if mark == nil {
			continue
		}
		if err := reader.Ack(*mark); err != nil {
			return err
		}
	}
}
