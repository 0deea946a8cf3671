// A plugin in Go: a few things to do with numbers. ../python/plugin.py and ../node/plugin.mjs are the same.

package main

import (
	"encoding/json"
	"fmt"
	"math"
	"math/big"
)

// divide(one, other, digits=2): a plain method, and an error that is a ZeroDivisionError in the host.
func divide(call *Call) (any, error) {
	one, other, digits := 0.0, 0.0, 2
	if err := call.Take("one other digits?", &one, &other, &digits); err != nil {
		return nil, err
	}
	Log("debug", "numbers", "dividing", Fields{"one": one, "other": other})
	if other == 0 {
		return nil, Fail("ZeroDivisionError", "division by zero")
	}
	scale := math.Pow10(digits)
	return math.Round(one/other*scale) / scale, nil
}

// primes(below=None): a stream, which waits for its reader. Its defer runs also when the host closes it.
func primes(call *Call) (any, error) {
	below, given := int64(math.MaxInt64), 0
	if err := call.Take("below?", &below); err != nil {
		return nil, err
	}
	return Stream(func(yield func(any) error) error {
		defer func() { Log("info", "numbers", "no more primes", Fields{"given": given}) }()
		for number := int64(2); number < below; number++ {
			if !big.NewInt(number).ProbablyPrime(0) { // which is sure of numbers of 64 bits
				continue
			}
			if err := yield(number); err != nil {
				return err
			}
			given++
		}
		return nil
	}), nil
}

// find(items, test): the first item that passes the test, a function of the host's.
func find(call *Call) (any, error) {
	var items []json.RawMessage
	var test Function
	if err := call.Take("items test", &items, &test); err != nil {
		return nil, err
	}
	for asked, item := range items {
		if call.Err() != nil {
			Log("warn", "numbers", "given up", Fields{"asked": asked})
			return nil, call.Err()
		}
		if passes, err := call.Ask(test, item); err != nil || string(passes) == "true" {
			return item, err
		}
	}
	return nil, Fail("LookupError", fmt.Sprintf("none of %d passes", len(items)))
}

func main() {
	Serve("numbers", Methods{"divide": divide, "primes": primes, "find": find}, Fields{"language": "Go"})
}
