package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// loadGrace is how long what is under way may take to end after the time of a load.
const loadGrace = 15 * time.Second

// volume is what a bulk load moved.
type volume struct {
	bytes int64 // as the reading end counted
	took  time.Duration
}

func (v volume) mibPerSecond() float64 {
	if v.took <= 0 {
		return 0
	}
	return float64(v.bytes) / (1 << 20) / v.took.Seconds()
}

func dial(ctx context.Context, addr string) (*net.TCPConn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// bulkDown writes streams to a sink for d. The sink's own counts are the
// result, so what was only buffered on the way does not count; the time ends
// when the last of them is here.
func bulkDown(ctx context.Context, addr string, streams int, d time.Duration) (volume, error) {
	data := pattern(bulkBuffer)
	var total atomic.Int64
	began := time.Now()
	until := began.Add(d)
	g, ctx := errgroup.WithContext(ctx)
	for range streams {
		g.Go(func() error {
			c, err := dial(ctx, addr)
			if err != nil {
				return err
			}
			defer func() { _ = c.Close() }()
			if err := c.SetDeadline(until.Add(loadGrace)); err != nil {
				return err
			}
			var wrote uint64
			for time.Now().Before(until) {
				n, err := c.Write(data)
				wrote += uint64(n)
				if err != nil {
					return fmt.Errorf("bulk after %d bytes: %w", wrote, err)
				}
			}
			if err := c.CloseWrite(); err != nil {
				return err
			}
			var got [8]byte
			if _, err := io.ReadFull(c, got[:]); err != nil {
				return fmt.Errorf("bulk: the sink's count after %d bytes: %w", wrote, err)
			}
			if n := binary.BigEndian.Uint64(got[:]); n != wrote {
				return fmt.Errorf("bulk: %d bytes were written, %d arrived", wrote, n)
			}
			total.Add(int64(wrote))
			return nil
		})
	}
	err := g.Wait()
	return volume{total.Load(), time.Since(began)}, err
}

// bulkUp reads streams of a source for d.
func bulkUp(ctx context.Context, addr string, streams int, d time.Duration) (volume, error) {
	var total atomic.Int64
	began := time.Now()
	until := began.Add(d)
	g, ctx := errgroup.WithContext(ctx)
	for range streams {
		g.Go(func() error {
			c, err := dial(ctx, addr)
			if err != nil {
				return err
			}
			defer func() { _ = c.Close() }()
			if err := c.SetDeadline(until.Add(loadGrace)); err != nil {
				return err
			}
			buf := make([]byte, bulkBuffer)
			for time.Now().Before(until) {
				n, err := c.Read(buf)
				total.Add(int64(n))
				if err != nil {
					return fmt.Errorf("bulk: read: %w", err)
				}
			}
			return nil
		})
	}
	err := g.Wait()
	return volume{total.Load(), time.Since(began)}, err
}

// latencies are those of all operations of a load, sorted.
type latencies struct {
	all  []time.Duration
	took time.Duration
}

func (l latencies) count() int { return len(l.all) }

func (l latencies) perSecond() float64 {
	if l.took <= 0 {
		return 0
	}
	return float64(len(l.all)) / l.took.Seconds()
}

func (l latencies) p(q float64) time.Duration { return percentile(l.all, q) }

// repeat runs op in workers, one after the other in each, for d.
func repeat(ctx context.Context, workers int, d time.Duration, op func(ctx context.Context, worker int) error) (latencies, error) {
	ctx, cancel := context.WithTimeout(ctx, d+loadGrace)
	defer cancel()
	var mu sync.Mutex
	var all []time.Duration
	began := time.Now()
	until := began.Add(d)
	g, ctx := errgroup.WithContext(ctx)
	for worker := range workers {
		g.Go(func() error {
			var mine []time.Duration
			for from := time.Now(); from.Before(until); {
				if err := op(ctx, worker); err != nil {
					return err
				}
				now := time.Now()
				mine = append(mine, now.Sub(from))
				from = now
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, mine...)
			return nil
		})
	}
	err := g.Wait()
	took := time.Since(began)
	slices.Sort(all)
	return latencies{all, took}, err
}

// requests sends small HTTP requests on keep-alive connections, one after the
// other on each, with the client of the standard library.
func requests(ctx context.Context, addr string, conns int, d time.Duration) (latencies, error) {
	transports := make([]*http.Transport, conns)
	for i := range transports {
		transports[i] = &http.Transport{MaxConnsPerHost: 1, MaxIdleConnsPerHost: 1, DisableCompression: true}
		defer transports[i].CloseIdleConnections()
	}
	buffers := make([]bytes.Buffer, conns)
	return repeat(ctx, conns, d, func(ctx context.Context, worker int) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/status", nil)
		if err != nil {
			return err
		}
		res, err := transports[worker].RoundTrip(req)
		if err != nil {
			return err
		}
		body := &buffers[worker]
		body.Reset()
		_, err = body.ReadFrom(res.Body)
		_ = res.Body.Close()
		switch {
		case err != nil:
			return err
		case res.StatusCode != http.StatusOK || body.String() != smallBody:
			return fmt.Errorf("answer %s with %d bytes", res.Status, body.Len())
		}
		return nil
	})
}

// connectionSize is what one new connection sends and gets back.
const connectionSize = 64

// connections opens a connection, sends a little, waits until it comes back
// and closes, over and over.
func connections(ctx context.Context, addr string, workers int, d time.Duration) (latencies, error) {
	data := pattern(connectionSize)
	return repeat(ctx, workers, d, func(ctx context.Context, _ int) error {
		c, err := dial(ctx, addr)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		if err := c.SetDeadline(time.Now().Add(loadGrace)); err != nil {
			return err
		}
		if _, err := c.Write(data); err != nil {
			return err
		}
		var got [connectionSize]byte
		if _, err := io.ReadFull(c, got[:]); err != nil {
			return fmt.Errorf("echo: %w", err)
		}
		if !bytes.Equal(got[:], data) {
			return errors.New("echo: other bytes came back")
		}
		return nil
	})
}
