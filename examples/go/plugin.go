// A plugin in Go: a few things to do with numbers. ../python/plugin.py and ../node/plugin.mjs are the same.

package main

import (
	"encoding/json"
	"fmt"
	"math"
	"math/big"
)

// divide is a plain method, with an error that is a ZeroDivisionError in the host.
func divide(call *Call, one, other float64, digits int) (float64, error) {
	Log("debug", "numbers", "dividing", Data{"one": one, "other": other})
	if other == 0 {
		return 0, Fail("ZeroDivisionError", "division by zero")
	}
	scale := math.Pow10(digits)
	return math.Round(one/other*scale) / scale, nil
}

// primes gives a stream, which waits for its reader. It also ends, by an error of Yield, when the host closes it.
func primes(call *Call, below int64) (err error) {
	given := 0
	for number := int64(2); err == nil && (below == 0 || number < below); number++ {
		if big.NewInt(number).ProbablyPrime(0) { // which is sure of numbers of 64 bits
			err = call.Yield(number)
			given++
		}
	}
	Log("info", "numbers", "no more primes", Data{"given": given})
	return err
}

// find gives the first item that passes the test, a function of the host's.
func find(call *Call, items []json.RawMessage, test Function) (any, error) {
	for asked, item := range items {
		if call.Err() != nil {
			Log("warn", "numbers", "given up", Data{"asked": asked})
			return nil, call.Err()
		}
		if passes, err := call.Ask(test, item); err != nil || string(passes) == "true" {
			return item, err
		}
	}
	return nil, Fail("LookupError", fmt.Sprintf("none of %d passes", len(items)))
}

func main() {
	Serve("numbers", Data{"language": "Go"}, Methods{
		"divide": {"one other digits=2", divide},
		"primes": {"below=null", primes},
		"find":   {"items test", find},
	})
}
