package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"
)

// measured is what the rounds of one figure gave.
type measured struct {
	Rounds []float64 `json:"rounds"`
	Commit string    `json:"commit"`
	Time   time.Time `json:"time"`
}

// value is the median of the rounds.
func (m measured) value() float64 { return median(m.Rounds) }

// scalePoint is what one RCP did with a number of nodes. A value below zero was
// not measured.
type scalePoint struct {
	Nodes     int       `json:"nodes"`
	RCPs      int       `json:"rcps"`
	Connect   float64   `json:"connect_seconds"` // until all were connected for the first time, enrolment included
	Reconnect float64   `json:"reconnect_seconds"`
	RSS       float64   `json:"rss_kib_per_node"`
	Anonymous float64   `json:"anonymous_kib_per_node"`
	Desired   float64   `json:"desired_seconds"`
	Commit    string    `json:"commit"`
	Time      time.Time `json:"time"`
}

// results are all figures that one machine has. Those of an earlier run stay
// until they are measured again, with the commit that they belong to.
type results struct {
	Machine machine             `json:"machine"`
	Haproxy string              `json:"haproxy"`
	Figures map[string]measured `json:"figures"`
	Scale   []scalePoint        `json:"scale"`
}

// put notes a figure.
func (b *bench) put(id string, rounds ...float64) {
	if !isFigure(id) {
		panic("no figure " + id)
	}
	b.results.Figures[id] = measured{Rounds: rounds, Commit: b.results.Machine.commit, Time: time.Now().UTC().Truncate(time.Second)}
}

// putScale notes what a number of nodes gave, in place of an earlier run's.
func (b *bench) putScale(p scalePoint) {
	p.Commit, p.Time = b.results.Machine.commit, time.Now().UTC().Truncate(time.Second)
	for i := range b.results.Scale {
		if b.results.Scale[i].Nodes == p.Nodes && b.results.Scale[i].RCPs == p.RCPs {
			b.results.Scale[i] = p
			return
		}
	}
	b.results.Scale = append(b.results.Scale, p)
}

// loadResults reads what earlier runs on this machine measured; nothing of
// another machine's.
func loadResults(file string, m machine) (results, error) {
	fresh := results{Machine: m, Figures: map[string]measured{}}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return fresh, nil
	}
	if err != nil {
		return fresh, err
	}
	var old results
	if err := json.Unmarshal(b, &old); err != nil {
		return fresh, fmt.Errorf("%s: %w", file, err)
	}
	if !old.Machine.same(m) {
		return fresh, nil
	}
	old.Machine = m
	for id := range old.Figures {
		if !isFigure(id) {
			delete(old.Figures, id)
		}
	}
	if old.Figures == nil {
		old.Figures = fresh.Figures
	}
	return old, nil
}

func (r results) save(file string) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}
