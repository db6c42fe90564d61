package main

import (
	"fmt"
	"strconv"
	"strings"
)

// scalePlan is one point of the row scale.
type scalePlan struct {
	nodes, rcps int
}

// parseScale reads 1000,50000/3: numbers of nodes, on one RCP or on several.
func parseScale(s string) ([]scalePlan, error) {
	var plans []scalePlan
	for _, part := range strings.Split(s, ",") {
		n, m, several := strings.Cut(part, "/")
		p := scalePlan{rcps: 1}
		var err error
		if p.nodes, err = strconv.Atoi(n); err == nil && several {
			p.rcps, err = strconv.Atoi(m)
		}
		if err != nil || p.nodes < 1 || p.rcps < 1 {
			return nil, fmt.Errorf("--scale %q: want numbers of nodes such as 1000,50000/3", s)
		}
		plans = append(plans, p)
	}
	return plans, nil
}
