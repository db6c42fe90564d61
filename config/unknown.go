package config

import (
	"errors"
	"regexp"
	"slices"
	"strings"
)

// serviceLink matches what Kubernetes puts into every pod for a service whose
// name begins with "sallyport" (enableServiceLinks): SALLYPORT_SERVICE_HOST,
// SALLYPORT_GATEWAY_PORT_8443_TCP_ADDR and so on. None of ours ends in _PORT.
var serviceLink = regexp.MustCompile(`^SALLYPORT(_.+)?_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT|PORT_[0-9]+_.+)$`)

// activeHelp matches what the completion scripts of fish and PowerShell set when
// they ask the program whose name it begins with.
var activeHelp = regexp.MustCompile(`^SALLYPORT(_RCP|_NODE)?_ACTIVE_HELP$`)

// Known refuses variables that begin with SALLYPORT_ and that no role of any
// program reads: a misspelt setting would silently be the default.
func Known(environ []string) error {
	names := Names()
	var errs []error
	for _, line := range environ {
		name, _, _ := strings.Cut(line, "=")
		if !strings.HasPrefix(name, Prefix) || slices.Contains(names, name) || serviceLink.MatchString(name) || activeHelp.MatchString(name) {
			continue
		}
		problem := "unknown variable; `sallyport config reference` lists all"
		if near := nearest(name, names); near != "" {
			problem = "unknown variable; did you mean " + near + "?"
		}
		errs = append(errs, &Error{Variable: name, Problem: problem})
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

// nearest returns the known name that takes the fewest edits, if that is few
// enough to be a slip.
func nearest(name string, known []string) string {
	best, bestDistance := "", 1+max(2, (len(name)-len(Prefix))/4)
	for _, k := range known {
		if d := distance(name, k); d < bestDistance {
			best, bestDistance = k, d
		}
	}
	return best
}

// distance is the Levenshtein distance in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
